"""The command line of both frameworks."""

import argparse
import sys
from pathlib import Path

from translation_recipes import PRESETS, SHAPES, listing

sys.path.append(str(Path(__file__).parents[1]))
import recipe_flags
from recipe_flags import positive, share


def arguments(description: str, *, beam: int) -> argparse.Namespace:
    """Parse the command line. ``recipe`` is the row with what the flags change.

    Args:
        description: the program's.
        beam: translations that it follows at a time by default.
    """
    parser = recipe_flags.common(
        description,
        PRESETS,
        "local-adam-slowmo",
        "folder of text and vocabulary, as parallel_text.py describes",
    )
    add = parser.add_argument
    add("--source", default="en", metavar="ENDING", help="of the files to translate (default: en)")
    add("--target", default="de", metavar="ENDING", help="of their translations (default: de)")
    add("--beam", type=positive, default=beam, metavar="N", help=f"translations followed at a time (default: {beam})")
    change = parser.add_argument_group("changes to the row").add_argument
    change("--model", choices=SHAPES, help="small and mini are for CPUs, tiny is for tests")
    change("--batch-tokens", type=positive, metavar="N", help="most sub-words per step and rank, on either side")
    change("--epochs", type=positive, metavar="N", help="passes over the training text")
    change("--lr", type=float, metavar="RATE", help="highest learning rate")
    change("--warmup-steps", type=positive, metavar="N", help="steps in which the rate grows to that")
    change("--dropout", type=share, metavar="SHARE", help="of the values of a layer that are set to 0")
    change("--label-smoothing", type=share, metavar="SHARE", help="of the probability that wrong sub-words get")
    change("--max-length", type=positive, metavar="N", help="leave out training pairs with more sub-words on a side")
    change("--period", type=positive, metavar="STEPS", help="inner steps between averages")
    change("--slow-momentum", type=float, metavar="BETA", help="of SlowMo")
    options: argparse.Namespace = recipe_flags.parse(parser, PRESETS, listing)
    return options
