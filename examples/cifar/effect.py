"""SlowMo's effect on 8 simulated workers, a small residual network and Fashion-MNIST: the CIFAR-10 part of its table 1.

Each run is written to a file of its own as soon as it is complete, so that this can be stopped and started again, cut
into parts (``--rows``, ``--seeds``), and run by several processes at a time. All methods share the schedule, the
learning rate and beta, except for BMUF, which has no momentum in the workers and the block momentum 1 - 1 / workers of
its paper (Chen and Huo, 2016). Double averaging (Yu et al., 2019) averages the momentum with the weights.

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

import torch
from recipes import PRESETS, Recipe
from train_torch import main as train

from lentando.comm import simulate

sys.path.append(str(Path(__file__).parents[1]))
from recipe_effect import Column, arguments, run_missing, table

WORKERS = 8
SETTING = {
    "model": "resnet8", "dataset": "fashion-mnist", "workers": WORKERS, "batch_size": 16, "warmup_epochs": 1,
    "weight_decay": 1e-4,
}  # fmt: skip
MILESTONES = (0.6, 0.87)
"""Shares of the epochs after which the learning rate is a tenth of what it was."""
COLUMNS = (
    Column("training loss", "training_loss"),
    Column("test accuracy", "accuracy", 100, 2, " %"),
    Column("rounds", "rounds", digits=0),
)


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


def run(row: str, seed: int, options: argparse.Namespace) -> Mapping[str, Any]:
    milestones = tuple(round(share * options.epochs) for share in MILESTONES)
    recipe = replace(ROWS[row], epochs=options.epochs, lr=options.lr, milestones=milestones)
    if recipe.slow_momentum is not None and recipe.momentum > 0:
        recipe = replace(recipe, slow_momentum=options.slow_momentum)
    given = argparse.Namespace(
        preset="slowmo-cifar10", row=row, recipe=recipe, data=options.data, output=None, resume=False, save_every=None,
        seed=seed, reduction="ring", limit=options.limit, any_size=options.any_size, no_progress=True,
        evaluate_every=recipe.epochs,
    )  # fmt: skip
    results: dict[str, Any] = simulate(lambda: train(given), size=WORKERS, isolate=False)[0]
    return results


def main() -> None:
    assert __doc__ is not None
    parser = arguments(__doc__, list(ROWS), "data")
    parser.add_argument("--limit", type=int, default=4096, metavar="N", help="train on the first N images")
    parser.add_argument("--epochs", type=int, default=15, metavar="N", help="(default: 15)")
    parser.add_argument("--lr", type=float, default=0.1, metavar="RATE", help="of all rows (default: 0.1)")
    parser.add_argument("--slow-momentum", type=float, default=0.6, metavar="BETA", help="of SlowMo (default: 0.6)")
    parser.add_argument("--any-size", action="store_true", help="accept fewer images than are published")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not options.table:
        settings = {name: getattr(options, name) for name in ("limit", "epochs", "lr", "slow_momentum")}
        run_missing(options, settings, lambda row, seed: run(row, seed, options))
    print(table(options.output, {name: row.published for name, row in ROWS.items()}, COLUMNS))


if __name__ == "__main__":
    main()
