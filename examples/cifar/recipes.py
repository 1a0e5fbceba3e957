"""The rows of the papers' tables as settings: model, data, schedule and method.

SlowMo (arXiv 1910.00643, sections 5 and 6, table 1) trains ResNet-18 on CIFAR-10. It tuned the learning rate for each
base algorithm and beta between 0.4 and 0.8, and prints neither: the rate of 0.1 for 256 images, scaled with the batch
(as in the experiments of SGP, arXiv 1811.10792, with their weight decay), and beta = 0.6 are choices of this file. Its
ResNet-50 on ImageNet follows Goyal et al. (2017); a node of 8 GPUs is a rank here.

AdaComm (arXiv 1810.08313, section 5) trains VGG-16 and ResNet-50 on CIFAR-10 and CIFAR-100, at a fixed learning rate
and with a schedule (rows that end in -decay), and compares by time. Its settings are here as summaries of the paper
have them. It chose the first period by a grid search: 20 and 5 are choices of this file, and so are 240 epochs.
"""

from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on, except for its seed and its ranks.

    Attributes:
        model: name of the network.
        dataset: name of the dataset.
        workers: ranks in the paper. The learning rate is scaled linearly when there are others.
        batch_size: images per step and rank.
        epochs: passes over the training images.
        lr: learning rate with ``workers`` ranks.
        warmup_epochs: epochs in which the rate grows linearly, step by step, from that of one rank.
        milestones: epochs from which on the rate is a tenth of what it was.
        momentum: Nesterov momentum.
        weight_decay: share of the weights that is added to their gradients.
        base: base algorithm: allreduce, localsgd, sgp or osgp.
        period: inner steps between exact averages; the first one of AdaComm; None without exact averages.
        adaptive: whether the period is AdaComm's.
        interval_seconds: time between AdaComm's decisions.
        slow_momentum: beta of SlowMo; None without SlowMo.
        exact_average: whether SlowMo begins its outer steps with an average.
        base_buffers: what an average does to the momentum of SGD: maintain, reset or average. None is the papers'
            choice: reset with slow momentum, maintain without.
        pixels: height and width of the images.
        published: what the paper reports, in words.
    """

    model: str
    dataset: str
    workers: int
    batch_size: int
    epochs: int
    lr: float
    weight_decay: float
    warmup_epochs: int = 0
    milestones: tuple[int, ...] = ()
    momentum: float = 0.9
    base: str = "localsgd"
    period: int | None = None
    adaptive: bool = False
    interval_seconds: float = 60.0
    slow_momentum: float | None = None
    exact_average: bool = True
    base_buffers: str | None = None
    pixels: int = 32
    published: str = ""

    def learning_rate(self, epoch: int, step: int, steps: int, ranks: int) -> float:
        """The rate of a step (from 0) of an epoch (from 0) of ``steps`` steps."""
        full = self.lr * ranks / self.workers
        warmup_steps = self.warmup_epochs * steps
        done = epoch * steps + step
        if done < warmup_steps:
            single = self.lr / self.workers
            return single + (full - single) * (done + 1) / warmup_steps
        return full * 0.1 ** sum(epoch >= milestone for milestone in self.milestones)

    def optimizer(self, lt: Any, sgd: Any, model: Any, reduction: str) -> Any:
        """Wrap SGD with the method of the row. ``lt`` is ``lentando.torch`` or ``lentando.tensorflow``."""
        base = {"allreduce": lt.AllReduce, "localsgd": lt.LocalSGD, "sgp": lt.SGP, "osgp": lt.OSGP}[self.base]
        # OSGP takes messages at fixed steps, so that a run can be repeated exactly.
        common = {"base": base(deterministic=True) if self.base == "osgp" else base(), "model": model}
        common |= {"algorithm": reduction}
        if self.base_buffers is not None:
            common["base_buffers"] = self.base_buffers
        if self.adaptive:
            return lt.AdaComm(
                sgd,
                initial_period=self.period,
                interval_seconds=self.interval_seconds,
                slow_momentum=self.slow_momentum or 0.0,
                **common,
            )
        if self.slow_momentum is not None:
            common |= {"slow_momentum": self.slow_momentum, "exact_average": self.exact_average}
            return lt.SlowMo(sgd, period=self.period, **common)
        # Without SlowMo, each rank keeps its momentum at averages.
        return lt.DistributedOptimizer(sgd, period=self.period, **common)


def _slowmo(plain: Recipe, gossip_period: int, published: dict[str, str]) -> dict[str, Recipe]:
    """The rows of a table of SlowMo's paper: synchronous SGD, and each base algorithm without and with SlowMo.

    Args:
        plain: what all rows share.
        gossip_period: period of SlowMo over gossip.
        published: what the paper reports, by row.
    """
    rows = {"ar-sgd": replace(plain, base="allreduce")}
    for name, base, period, slow_period in (
        ("local-sgd", "localsgd", 12, 12),
        ("osgp", "osgp", None, gossip_period),
        ("sgp", "sgp", None, gossip_period),
    ):
        rows[name] = replace(plain, base=base, period=period)
        rows[f"{name}-slowmo"] = replace(plain, base=base, period=slow_period, slow_momentum=0.6)
    return {name: replace(row, published=published[name]) for name, row in rows.items()}


def _slowmo_cifar10() -> dict[str, Recipe]:
    plain = Recipe(
        model="resnet18",
        dataset="cifar10",
        workers=32,
        batch_size=128,
        epochs=200,
        lr=0.1 * 4096 / 256,
        weight_decay=1e-4,
        warmup_epochs=5,
        milestones=(100, 150, 175),
    )
    published = {
        "ar-sgd": "loss 0.002, accuracy 92.66 %",
        "local-sgd": "loss 0.122, accuracy 91.73 %",
        "local-sgd-slowmo": "loss 0.006, accuracy 93.20 %",
        "osgp": "loss 0.011, accuracy 93.17 %",
        "osgp-slowmo": "loss 0.001, accuracy 93.74 %",
        "sgp": "loss 0.002, accuracy 93.90 %",
        "sgp-slowmo": "loss 0.001, accuracy 94.32 %",
    }
    return _slowmo(plain, 12, published)


def _slowmo_imagenet() -> dict[str, Recipe]:
    plain = Recipe(
        model="resnet50-imagenet",
        dataset="imagenet",
        workers=32,
        batch_size=256,
        epochs=90,
        lr=0.1 * 8192 / 256,
        weight_decay=1e-4,
        warmup_epochs=5,
        milestones=(30, 60, 80),
        pixels=224,
    )
    published = {
        "ar-sgd": "loss 0.96, accuracy 76.00 %",
        "local-sgd": "loss 1.43, accuracy 69.94 %",
        "local-sgd-slowmo": "loss 1.21, accuracy 73.24 %",
        "osgp": "loss 1.03, accuracy 74.96 %",
        "osgp-slowmo": "loss 0.97, accuracy 75.54 %",
        "sgp": "loss 1.07, accuracy 75.15 %",
        "sgp-slowmo": "loss 1.00, accuracy 75.73 %",
    }
    rows = _slowmo(plain, 48, published)
    rows["sgp-slowmo-noaverage"] = replace(rows["sgp-slowmo"], exact_average=False, published="accuracy 75.78 %")
    rows["local-sgd-double-averaging"] = replace(
        rows["local-sgd"], base_buffers="average", published="accuracy 72.04 %"
    )
    return rows


def _adacomm(model: str, dataset: str, lr: float, first_period: int, published: tuple[str, str]) -> dict[str, Recipe]:
    plain = Recipe(
        model=model, dataset=dataset, workers=4, batch_size=128, epochs=240, lr=lr, weight_decay=5e-4, momentum=0.0
    )
    synchronous, adaptive = published
    rows = {"sync": replace(plain, base="allreduce", published=synchronous)}
    rows |= {f"tau-{period}": replace(plain, period=period) for period in (first_period, 100)}
    rows["adacomm"] = replace(plain, period=first_period, adaptive=True, published=adaptive)
    rows |= {
        f"{name}-decay": replace(row, milestones=(80, 120, 160, 200), published="") for name, row in tuple(rows.items())
    }
    rows["adacomm-block-momentum"] = replace(rows["adacomm-decay"], momentum=0.9, slow_momentum=0.3)
    return rows


VGG16 = (64, 64, "pool", 128, 128, "pool", 256, 256, 256, "pool", 512, 512, 512, "pool", 512, 512, 512, "pool")
"""VGG-16's convolutions by their channels, and its pooling."""
VGG6 = (8, "pool", 16, "pool", 32, "pool", 32, "pool", 64, "pool")
"""The same of a small network that is built alike."""
NOTHING = ("", "")
PRESETS = {
    "slowmo-cifar10": _slowmo_cifar10(),
    "slowmo-imagenet": _slowmo_imagenet(),
    "adacomm-vgg16-cifar10": _adacomm("vgg16", "cifar10", 0.2, 20, ("38.0 min to a loss", "11.5 min to the same loss")),
    "adacomm-vgg16-cifar100": _adacomm("vgg16", "cifar100", 0.2, 20, NOTHING),
    "adacomm-resnet50-cifar10": _adacomm(
        "resnet50", "cifar10", 0.4, 5, ("21.5 min to a loss", "15.0 min to the same loss")
    ),
    "adacomm-resnet50-cifar100": _adacomm("resnet50", "cifar100", 0.4, 5, NOTHING),
}
"""For each experiment of a paper, its rows by name."""


def listing() -> str:
    """Return all rows, one in each line, under their presets."""
    lines = []
    for preset, rows in PRESETS.items():
        first = next(iter(rows.values()))
        lines.append(f"{preset}: {first.model} on {first.dataset}, {first.workers} ranks x {first.batch_size} images")
        for name, row in rows.items():
            method = [row.base, f"period {'' if not row.adaptive else 'from '}{row.period}" if row.period else ""]
            method += [f"slow momentum {row.slow_momentum}" if row.slow_momentum is not None else "", row.published]
            lines.append(f"  --row {name:23} {'; '.join(filter(None, method))}")
    return "\n".join(lines)
