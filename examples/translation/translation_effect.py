"""SlowMo's effect on 8 simulated workers, a small Transformer and English-German text: the WMT'16 part of its table 1.

Each run is written to a file of its own as soon as it is complete, so that this can be stopped and started again, cut
into parts (``--rows``, ``--seeds``), and run by several processes at a time. All methods share the schedule, the
learning rate and beta. So small a network, trained so briefly, does not overfit: it has no dropout.

    make data
    python examples/translation/translation_effect.py --output runs/translation                # hours on two cores
    python examples/translation/translation_effect.py --output runs/translation --rows sgp --seeds 0     # one run
    python examples/translation/translation_effect.py --output runs/translation --table
"""

import argparse
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from translation_recipes import PRESETS, SHAPES

from lentando.comm import simulate

sys.path.append(str(Path(__file__).parents[1]))
from recipe_effect import Column, arguments, differences, run_missing, table

WORKERS = 8
ROWS = PRESETS["slowmo-wmt16"]
FIGURES = (
    Column("training loss", "training_loss"),
    Column("validation loss", "valid_loss"),
    Column("test BLEU", "test_bleu", digits=2),
)
ROUNDS = Column("rounds", "rounds", digits=0)
PAIRS = (
    ("local-adam-slowmo", "local-adam"),
    ("local-adam-reset", "local-adam"),
    ("local-adam-average", "local-adam"),
    ("local-adam-slowmo-reset", "local-adam-slowmo"),
    ("local-adam-slowmo-average", "local-adam-slowmo"),
    ("sgp-slowmo", "sgp"),
    ("sgp-slowmo-noaverage", "sgp-slowmo"),
    ("osgp-slowmo", "osgp"),
)
"""Rows, and those that they are compared with."""


def run(row: str, seed: int, options: argparse.Namespace) -> Mapping[str, Any]:
    import torch  # takes seconds, which --table and --missing do not need
    from train_torch import main as train

    torch.set_num_threads(1)
    recipe = replace(
        ROWS[row], model=options.model, batch_tokens=options.batch_tokens, epochs=options.epochs, lr=options.lr,
        warmup_steps=options.warmup_steps, dropout=options.dropout, max_length=options.max_length,
    )  # fmt: skip
    if recipe.slow_momentum is not None:
        recipe = replace(recipe, slow_momentum=options.slow_momentum)
    given = argparse.Namespace(
        preset="slowmo-wmt16", row=row, recipe=recipe, data=options.data, source="en", target="de", beam=options.beam,
        output=None, resume=False, save_every=None, seed=seed, reduction="ring", no_progress=True, evaluate_every=1,
    )  # fmt: skip
    results: dict[str, Any] = simulate(lambda: train(given), size=WORKERS, isolate=False)[0]
    return results


SHARED = {
    "model": "mini", "batch_tokens": 128, "epochs": 4, "lr": 3e-3, "warmup_steps": 400, "dropout": 0.0,
    "max_length": 60, "beam": 4, "slow_momentum": 0.6,
}  # fmt: skip
"""What all rows share, and flags of these names change."""


def main() -> None:
    assert __doc__ is not None
    parser = arguments(__doc__, list(ROWS), "data/gettext-en-de")
    for name, default in SHARED.items():
        choices = list(SHAPES) if name == "model" else None
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=type(default), default=default, choices=choices, help=f"(default: {default})")
    options = parser.parse_args()
    if not options.table:
        settings = {name: getattr(options, name) for name in SHARED}
        run_missing(options, settings, lambda row, seed: run(row, seed, options))
    print(table(options.output, {name: row.published for name, row in ROWS.items()}, (*FIGURES, ROUNDS)))
    print(differences(options.output, PAIRS, FIGURES))


if __name__ == "__main__":
    main()
