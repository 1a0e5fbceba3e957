"""What the command lines of the papers' recipes share."""

import argparse
from collections.abc import Callable, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def share(text: str) -> float:
    """A number from 0 on that is less than 1."""
    number = float(text)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 0 and less than 1")
    return number


def common(description: str, presets: Mapping[str, Any], row: str, data: str) -> argparse.ArgumentParser:
    """Return a parser of what every recipe takes: the row and the run, not what changes the row.

    Args:
        description: the program's.
        presets: the rows of each experiment by name; the first one is the default.
        row: the default row.
        data: what lies in the folder of ``--data``, in words.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    first = next(iter(presets))
    add("--list", action="store_true", help="print presets and rows, with the papers' results, and end")
    add("--preset", choices=presets, default=first, help=f"experiment of a paper (default: {first})")
    add("--row", default=row, help=f"row of its table (default: {row})")
    add("--data", type=Path, default=Path("data"), help=f"{data} (default: data)")
    add("--output", type=Path, metavar="DIR", help="folder of the log, the results and the checkpoint")
    add("--resume", action="store_true", help="continue from the checkpoint in --output, if there is one")
    add("--save-every", type=positive, metavar="STEPS", help="steps between checkpoints (default: an epoch)")
    add("--evaluate-every", type=positive, default=1, metavar="EPOCHS", help="epochs between evaluations (default: 1)")
    add("--seed", type=int, default=0, help="initial weights, order of the data, and what else is random (default: 0)")
    add("--simulate", type=positive, metavar="N", help="train on N simulated ranks in this process")
    add("--reduction", choices=("auto", "ring", "backend"), default="auto",
        help="how averages are formed; with ring, real and simulated ranks of PyTorch are bit-identical")  # fmt: skip
    add("--no-progress", action="store_true", help="show no progress bar")
    return parser


def parse(parser: argparse.ArgumentParser, presets: Mapping[str, Any], listing: Callable[[], str]) -> Any:
    """Parse the command line. ``recipe`` is the row, a dataclass, with the fields that flags of their names change."""
    options = parser.parse_args()
    if options.list:
        print(listing())
        parser.exit()
    rows = presets[options.preset]
    if options.row not in rows:
        parser.error(f"{options.preset} has no row {options.row}: choose from {', '.join(rows)}")
    if options.output is None and (options.resume or options.save_every):
        parser.error("--resume and --save-every need --output, the folder of the checkpoint")
    given = {field.name: getattr(options, field.name, None) for field in fields(rows[options.row])}
    changed = {
        name: tuple(value) if isinstance(value, list) else value for name, value in given.items() if value is not None
    }
    options.recipe = replace(rows[options.row], **changed)
    return options
