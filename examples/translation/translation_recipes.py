"""The rows of SlowMo's WMT'16 English-German experiment as settings: model, batches, schedule and method.

SlowMo (arXiv 1910.00643, sections 5 and 6, tables 1 and 2) trains a Transformer on 8 nodes with batches of 200,000
sub-words, for 25 epochs, and follows Ott et al. (2018) otherwise. What that leaves open is a choice of this file: their
large Transformer and its dropout, a rate of 0.0005 after 4,000 steps of warm-up, and beta = 0.6 (the paper tuned it
between 0.4 and 0.8, and prints it for the row without averages). A node is a rank here; the rate of Adam is not scaled
to the number of ranks.
"""

from dataclasses import dataclass, replace
from typing import Any, Literal


@dataclass(frozen=True)
class Shape:
    """The size of a Transformer, with as many layers in the decoder as in the encoder."""

    width: int
    heads: int
    feed_forward: int
    layers: int


SHAPES = {
    "big": Shape(1024, 16, 4096, 6),
    "base": Shape(512, 8, 2048, 6),
    "small": Shape(128, 4, 512, 2),
    "mini": Shape(64, 4, 256, 1),
    "tiny": Shape(32, 2, 64, 1),
}
"""Vaswani et al. (2017): big and base; smaller ones for CPUs and for tests."""


@dataclass(frozen=True)
class Recipe:
    """Everything that a training run depends on, except for its data, its seed and its ranks.

    Attributes:
        model: a key of ``SHAPES``.
        batch_tokens: most sub-words of a batch of a rank, on either side.
        epochs: passes over the training text.
        lr: the highest learning rate of Adam (betas 0.9 and 0.98).
        warmup_steps: steps in which the rate grows linearly to that. Then it falls as 1 / sqrt(steps).
        dropout: share of activations that are dropped.
        label_smoothing: share of the target that is spread over all sub-words.
        max_length: training pairs with more sub-words on a side are left out.
        base: base algorithm: allreduce, localsgd, sgp or osgp.
        period: inner steps between exact averages; None without exact averages.
        slow_momentum: beta of SlowMo; None without SlowMo.
        exact_average: whether SlowMo begins its outer steps with an average.
        base_buffers: what an average does to the moments of Adam: maintain, reset or average.
        published: what the paper reports, in words.
    """

    model: str = "big"
    batch_tokens: int = 25_000
    epochs: int = 25
    lr: float = 5e-4
    warmup_steps: int = 4000
    dropout: float = 0.3
    label_smoothing: float = 0.1
    max_length: int = 250
    base: str = "localsgd"
    period: int | None = None
    slow_momentum: float | None = None
    exact_average: bool = True
    base_buffers: Literal["maintain", "reset", "average"] = "maintain"
    published: str = ""

    def learning_rate(self, step: int) -> float:
        """The rate of a step, from 0 over all epochs."""
        done = step + 1
        if done <= self.warmup_steps:
            return self.lr * done / self.warmup_steps
        return self.lr * float(self.warmup_steps / done) ** 0.5

    def optimizer(self, lt: Any, adam: Any, model: Any, reduction: str) -> Any:
        """Wrap Adam with the method of the row. ``lt`` is ``lentando.torch`` or ``lentando.tensorflow``."""
        base = {"allreduce": lt.AllReduce, "localsgd": lt.LocalSGD, "sgp": lt.SGP, "osgp": lt.OSGP}[self.base]
        # OSGP takes messages at fixed steps, so that a run can be repeated exactly.
        common = {"base": base(deterministic=True) if self.base == "osgp" else base(), "model": model}
        common |= {"period": self.period, "base_buffers": self.base_buffers, "algorithm": reduction}
        if self.slow_momentum is None:
            return lt.DistributedOptimizer(adam, **common)
        return lt.SlowMo(adam, slow_momentum=self.slow_momentum, exact_average=self.exact_average, **common)


def _slowmo_wmt16() -> dict[str, Recipe]:
    def with_slowmo(row: Recipe, period: int, published: str = "") -> Recipe:
        return replace(row, period=period, slow_momentum=0.6, published=published)

    local = Recipe(period=12, published="loss 2.520, BLEU 26.62")
    gossip = {
        "sgp": Recipe(base="sgp", published="loss 2.500, BLEU 26.92"),
        "osgp": Recipe(base="osgp"),
    }
    rows = {"ar-adam": Recipe(base="allreduce", published="loss 2.468, BLEU 27.17")}
    for strategy in ("maintain", "reset", "average"):  # the paper maintains the moments
        ending = "" if strategy == "maintain" else f"-{strategy}"
        rows[f"local-adam{ending}"] = replace(local, base_buffers=strategy, published="" if ending else local.published)
        rows[f"local-adam-slowmo{ending}"] = with_slowmo(
            rows[f"local-adam{ending}"], 12, "" if ending else "loss 2.480, BLEU 27.14"
        )
    rows |= gossip
    rows["sgp-slowmo"] = with_slowmo(gossip["sgp"], 48, "loss 2.447, BLEU 27.84")
    rows["sgp-slowmo-noaverage"] = replace(
        with_slowmo(gossip["sgp"], 48, "validation loss 2.11, with averages 2.10"), exact_average=False
    )
    rows["osgp-slowmo"] = with_slowmo(gossip["osgp"], 48)
    return rows


PRESETS = {"slowmo-wmt16": _slowmo_wmt16()}
"""For each experiment of a paper, its rows by name."""


def listing() -> str:
    """Return all rows, one in each line, under their presets."""
    lines = []
    for preset, rows in PRESETS.items():
        first = next(iter(rows.values()))
        lines.append(f"{preset}: {first.model} Transformer, 8 ranks x {first.batch_tokens} sub-words")
        for name, row in rows.items():
            method = [row.base, f"period {row.period}" if row.period else ""]
            method += [f"slow momentum {row.slow_momentum}" if row.slow_momentum is not None else ""]
            method += ["" if row.exact_average else "no averages"]
            method += [f"moments: {row.base_buffers}" if row.period else "", row.published]
            lines.append(f"  --row {name:25} {'; '.join(filter(None, method))}")
    return "\n".join(lines)
