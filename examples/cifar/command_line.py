"""The command line of both frameworks."""

import argparse
from dataclasses import fields, replace
from pathlib import Path

from archives import DATASETS
from recipes import PRESETS, Recipe, listing

MODELS = ("resnet8", "resnet18", "resnet50", "vgg16")


def positive(text: str) -> int:
    """An integer of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def arguments(description: str) -> argparse.Namespace:
    """Parse the command line. ``recipe`` is the row with what the flags change."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--list", action="store_true", help="print presets and rows, with the papers' results, and end")
    add("--preset", choices=PRESETS, default="slowmo-cifar10", help="experiment of a paper (default: slowmo-cifar10)")
    add("--row", default="local-sgd-slowmo", help="row of its table (default: local-sgd-slowmo)")
    add(
        "--data",
        type=Path,
        default=Path("data"),
        help="folder of the dataset, as archives.py describes (default: data)",
    )
    add("--output", type=Path, metavar="DIR", help="folder of the log, the results and the checkpoint")
    add("--resume", action="store_true", help="continue from the checkpoint in --output, if there is one")
    add("--save-every", type=positive, metavar="STEPS", help="steps between checkpoints (default: an epoch)")
    add("--evaluate-every", type=positive, default=1, metavar="EPOCHS", help="epochs between evaluations (default: 1)")
    add("--seed", type=int, default=0, help="initial weights, order of the images, augmentation (default: 0)")
    add("--simulate", type=positive, metavar="N", help="train on N simulated ranks in this process")
    add("--reduction", choices=("auto", "ring", "backend"), default="auto",
        help="how averages are formed; with ring, real and simulated ranks of PyTorch are bit-identical")  # fmt: skip
    add("--limit", type=positive, metavar="N", help="train on the first N images only")
    add("--any-size", action="store_true", help="accept a dataset with fewer images than the published one")
    add("--no-progress", action="store_true", help="show no progress bar")
    change = parser.add_argument_group("changes to the row").add_argument
    change("--model", choices=MODELS, help="resnet8 is a small one for CPUs")
    change("--dataset", choices=DATASETS)
    change("--workers", type=positive, metavar="N", help="ranks for which the learning rate stands")
    change("--batch-size", type=positive, metavar="N", help="images per step and rank")
    change("--epochs", type=positive, metavar="N", help="passes over the training images")
    change("--lr", type=float, metavar="RATE", help="learning rate with --workers ranks; it is scaled to others")
    change("--warmup-epochs", type=int, metavar="N", help="epochs in which the rate grows to that")
    change("--milestones", type=int, nargs="*", metavar="EPOCH", help="epochs from which on it is a tenth")
    change("--weight-decay", type=float, metavar="SHARE")
    change("--momentum", type=float, metavar="SHARE", help="Nesterov momentum of SGD")
    change("--period", type=positive, metavar="STEPS", help="inner steps between averages; the first of AdaComm")
    change("--slow-momentum", type=float, metavar="BETA", help="of SlowMo")
    change("--interval-seconds", type=float, metavar="SECONDS", help="time between AdaComm's decisions")
    options = parser.parse_args()
    if options.list:
        print(listing())
        parser.exit()
    rows = PRESETS[options.preset]
    if options.row not in rows:
        parser.error(f"{options.preset} has no row {options.row}: choose from {', '.join(rows)}")
    if options.output is None and (options.resume or options.save_every):
        parser.error("--resume and --save-every need --output, the folder of the checkpoint")
    given = {field.name: getattr(options, field.name, None) for field in fields(Recipe)}
    changed = {
        name: tuple(value) if name == "milestones" else value for name, value in given.items() if value is not None
    }
    options.recipe = replace(rows[options.row], **changed)
    return options
