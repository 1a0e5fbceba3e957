"""SlowMo's effect on 8 simulated workers, a small residual network and Fashion-MNIST: the CIFAR-10 part of its table 1.

Each run is written to a file of its own as soon as it is complete, so that this can be stopped and started again, cut
into parts (``--rows``, ``--seeds``), and run by several processes at a time. As in the paper, each row has its own
learning rate and beta (``TUNED``). BMUF has no momentum in the workers and the block momentum 1 - 1 / workers of its
paper (Chen and Huo, 2016). Double averaging (Yu et al., 2019) averages the momentum with the weights.

The images are few and the epochs many: 1,920 steps, which are 160 rounds of 12, about as many as in the paper, and the
network comes close to fitting the images, so that the training loss shows how well a method optimizes.

    make data
    python examples/cifar/effect.py --output runs/effect                       # hours on two cores
    python examples/cifar/effect.py --output runs/effect --rows sgp --seeds 0  # one run
    python examples/cifar/effect.py --output runs/effect --table               # the table of the complete runs
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from recipes import PRESETS, Recipe

from lentando.comm import simulate

sys.path.append(str(Path(__file__).parents[1]))
from recipe_effect import Column, arguments, differences, run_missing, table

WORKERS = 8
SETTING = {
    "model": "resnet8", "dataset": "fashion-mnist", "workers": WORKERS, "batch_size": 16, "warmup_epochs": 1,
    "weight_decay": 1e-4,
}  # fmt: skip
MILESTONES = (0.6, 0.87)
"""Shares of the epochs after which the learning rate is a tenth of what it was."""
SETTINGS = Column("rate", "lr", digits=2), Column("beta", "slow_momentum", digits=2)
FIGURES = Column("training loss", "training_loss"), Column("test accuracy", "accuracy", 100, 2, " %")
ROUNDS = Column("rounds", "rounds", digits=0)
PAIRS = (
    ("local-sgd-slowmo-12", "local-sgd-12"),
    ("local-sgd-slowmo-48", "local-sgd-48"),
    ("sgp-slowmo-12", "sgp"),
    ("sgp-slowmo-48", "sgp"),
    ("osgp-slowmo-12", "osgp"),
    ("osgp-slowmo-48", "osgp"),
    ("sgp-slowmo-noaverage-48", "sgp-slowmo-48"),
    ("local-sgd-slowmo-12", "bmuf-12"),
    ("local-sgd-slowmo-12", "double-averaging-12"),
)
"""Rows, and those that they are compared with."""


def _rows() -> dict[str, Recipe]:
    """The rows by name: base algorithm, variant, and the period."""
    paper = {name: replace(row, **SETTING) for name, row in PRESETS["slowmo-cifar10"].items()}
    unpublished = {name: replace(row, published="") for name, row in paper.items()}
    rows = {"ar-sgd": paper["ar-sgd"]}
    for base in ("local-sgd", "sgp", "osgp"):
        if base == "local-sgd":
            rows |= {"local-sgd-12": paper[base], "local-sgd-48": replace(unpublished[base], period=48)}
        else:
            rows[base] = paper[base]
        rows[f"{base}-slowmo-12"] = paper[f"{base}-slowmo"]
        rows[f"{base}-slowmo-48"] = replace(unpublished[f"{base}-slowmo"], period=48)
    rows["bmuf-12"] = replace(unpublished["local-sgd-slowmo"], momentum=0.0, slow_momentum=1 - 1 / WORKERS)
    rows["double-averaging-12"] = replace(unpublished["local-sgd"], base_buffers="average")
    rows["sgp-slowmo-noaverage-48"] = replace(rows["sgp-slowmo-48"], exact_average=False)
    return rows


ROWS = _rows()
TUNED: dict[str, tuple[float, float | None]] = {
    "ar-sgd": (0.2, None),
    "local-sgd-12": (0.05, None),
    "local-sgd-slowmo-12": (0.1, 0.8),
    "local-sgd-48": (0.1, None),
    "local-sgd-slowmo-48": (0.1, 0.6),
    "sgp": (0.2, None),
    "sgp-slowmo-12": (0.2, 0.6),
    "sgp-slowmo-48": (0.2, 0.6),
    "osgp": (0.4, None),
    "osgp-slowmo-12": (0.1, 0.6),
    "osgp-slowmo-48": (0.1, 0.6),
    "bmuf-12": (0.2, None),
    "double-averaging-12": (0.1, None),
    "sgp-slowmo-noaverage-48": (0.2, 0.6),
}
"""The learning rate and beta of each row that had the lowest training loss with seed 10, which the table does not use.

Tried were the rates 0.1 and 0.2 with beta = 0.6 and 0.8, and for some rows 0.05 and 0.4, too. The row without averages
has the settings of the row with them.
"""


def run(row: str, seed: int, options: argparse.Namespace) -> Mapping[str, Any]:
    import torch  # takes seconds, which --table and --missing do not need
    from train_torch import main as train

    torch.set_num_threads(1)
    milestones = tuple(round(share * options.epochs) for share in MILESTONES)
    lr, slow_momentum = TUNED[row]
    lr = lr if options.lr is None else options.lr
    recipe = replace(ROWS[row], epochs=options.epochs, lr=lr, milestones=milestones)
    if slow_momentum is not None:
        given = options.slow_momentum
        recipe = replace(recipe, slow_momentum=slow_momentum if given is None else given)
    flags = argparse.Namespace(
        preset="slowmo-cifar10", row=row, recipe=recipe, data=options.data, output=None, resume=False, save_every=None,
        seed=seed, reduction="ring", limit=options.limit, any_size=options.any_size, no_progress=True,
        evaluate_every=recipe.epochs,
    )  # fmt: skip
    results: dict[str, Any] = simulate(lambda: train(flags), size=WORKERS, isolate=False)[0]
    return {**results, "lr": recipe.lr, "slow_momentum": recipe.slow_momentum}


def main() -> None:
    assert __doc__ is not None
    parser = arguments(__doc__, list(ROWS), "data")
    parser.add_argument("--limit", type=int, default=1024, metavar="N", help="train on the first N images")
    parser.add_argument("--epochs", type=int, default=240, metavar="N", help="(default: 240)")
    parser.add_argument("--lr", type=float, metavar="RATE", help="of all rows (default: the best of each)")
    parser.add_argument("--slow-momentum", type=float, metavar="BETA", help="of SlowMo (default: the best of each row)")
    parser.add_argument("--any-size", action="store_true", help="accept fewer images than are published")
    options = parser.parse_args()
    if not options.table:
        settings = {name: getattr(options, name) for name in ("limit", "epochs", "lr", "slow_momentum")}
        run_missing(options, settings, lambda row, seed: run(row, seed, options))
    print(table(options.output, {name: row.published for name, row in ROWS.items()}, (*SETTINGS, *FIGURES, ROUNDS)))
    print(differences(options.output, PAIRS, FIGURES))


if __name__ == "__main__":
    main()
