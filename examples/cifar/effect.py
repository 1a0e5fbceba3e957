"""SlowMo's effect on 8 simulated workers, a small residual network and Fashion-MNIST: the CIFAR-10 part of its table 1.

Each run is written to a file of its own as soon as it is complete, so that this can be stopped and started again, and
cut into parts (``--rows``, ``--seeds``). All methods share the schedule, the learning rate and beta.

    make data
    python examples/cifar/effect.py --output runs/effect                       # hours on two cores
    python examples/cifar/effect.py --output runs/effect --rows sgp --seeds 0  # one run
    python examples/cifar/effect.py --output runs/effect --table               # the table of the complete runs
"""

import argparse
import json
import statistics
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from recipes import PRESETS
from train_torch import main as train

from lentando.comm import simulate

WORKERS = 8
BASES = ("local-sgd", "sgp", "osgp")
PERIODS = (12, 48)
PAPER = PRESETS["slowmo-cifar10"]
SETTING = {
    "model": "resnet8", "dataset": "fashion-mnist", "workers": WORKERS, "batch_size": 16, "epochs": 15, "lr": 0.1,
    "warmup_epochs": 1, "milestones": (9, 13), "weight_decay": 1e-4,
}  # fmt: skip
IMAGES = 4096
SLOW_MOMENTUM = 0.6
ROWS = {"ar-sgd": replace(PAPER["ar-sgd"], **SETTING)}
for base in BASES:
    for period in PERIODS if base == "local-sgd" else ():
        ROWS[f"{base}-{period}"] = replace(PAPER[base], **SETTING, period=period)
    if base != "local-sgd":
        ROWS[base] = replace(PAPER[base], **SETTING)
    for period in PERIODS:
        changed = {**SETTING, "period": period, "slow_momentum": SLOW_MOMENTUM}
        ROWS[f"{base}-slowmo-{period}"] = replace(PAPER[f"{base}-slowmo"], **changed)
"""The rows by name: base algorithm, with or without SlowMo, and the period."""


def run(row: str, seed: int, options: argparse.Namespace) -> None:
    """Train a row with a seed, unless its results exist."""
    file = options.output / f"{row}-seed{seed}.json"
    if file.exists():
        return
    recipe = ROWS[row]
    given = argparse.Namespace(
        preset="slowmo-cifar10", row=row, recipe=recipe, data=options.data, output=None, resume=False, save_every=None,
        seed=seed, reduction="ring", limit=options.limit, any_size=options.any_size, no_progress=True,
        evaluate_every=recipe.epochs,
    )  # fmt: skip
    results = simulate(lambda: train(given), size=WORKERS, isolate=False)[0]
    unfinished = file.with_suffix(".part")
    unfinished.write_text(json.dumps(results) + "\n")
    unfinished.replace(file)


def table(folder: Path) -> str:
    """Means and standard deviations over the seeds of the complete runs, as Markdown."""
    lines = ["| row | seeds | training loss | test accuracy | rounds |", "|---|---|---|---|---|"]
    for row in ROWS:
        runs = [json.loads(file.read_text()) for file in sorted(folder.glob(f"{row}-seed*.json"))]
        if runs:
            cells = [row, len(runs), in_words(runs, "training_loss", 1, 4), in_words(runs, "accuracy", 100, 2) + " %"]
            lines.append("| " + " | ".join(map(str, [*cells, runs[0]["rounds"]])) + " |")
    return "\n".join(lines)


def in_words(runs: Sequence[dict[str, Any]], name: str, factor: float, digits: int) -> str:
    values = [factor * run[name] for run in runs]
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{spread}"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the results")
    parser.add_argument("--data", type=Path, default=Path("data"), help="folder that holds fashion-mnist/")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2], metavar="SEED")
    parser.add_argument("--table", action="store_true", help="only print the table")
    parser.add_argument("--limit", type=int, default=IMAGES, metavar="N", help="train on the first N images")
    parser.add_argument("--any-size", action="store_true", help="accept fewer images than are published")
    options = parser.parse_args()
    torch.set_num_threads(1)
    options.output.mkdir(parents=True, exist_ok=True)
    if not options.table:
        for seed in options.seeds:
            for row in options.rows:
                run(row, seed, options)
    print(table(options.output))


if __name__ == "__main__":
    main()
