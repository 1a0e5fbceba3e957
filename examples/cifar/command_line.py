"""The command line of both frameworks."""

import argparse
import sys
from pathlib import Path

from archives import DATASETS
from recipes import PRESETS, listing

sys.path.append(str(Path(__file__).parents[1]))
import recipe_flags
from recipe_flags import positive

MODELS = ("resnet8", "resnet18", "resnet50", "vgg6", "vgg16", "resnet50-imagenet")


def arguments(description: str) -> argparse.Namespace:
    """Parse the command line. ``recipe`` is the row with what the flags change."""
    parser = recipe_flags.common(
        description, PRESETS, "local-sgd-slowmo", "folder of the dataset, as archives.py and image_files.py describe"
    )
    add = parser.add_argument
    add("--limit", type=positive, metavar="N", help="train on the first N images only")
    add("--threads", type=positive, metavar="N", help="that decode ImageNet's images (default: the cores)")
    add("--any-size", action="store_true", help="accept a dataset with fewer images than the published one")
    change = parser.add_argument_group("changes to the row").add_argument
    change("--model", choices=MODELS, help="resnet8 and vgg6 are small ones for CPUs")
    change("--dataset", choices=(*DATASETS, "imagenet"))
    change("--workers", type=positive, metavar="N", help="ranks for which the learning rate stands")
    change("--batch-size", type=positive, metavar="N", help="images per step and rank")
    change("--pixels", type=positive, metavar="N", help="height and width of ImageNet's images")
    change("--epochs", type=positive, metavar="N", help="passes over the training images")
    change("--lr", type=float, metavar="RATE", help="learning rate with --workers ranks; it is scaled to others")
    change("--warmup-epochs", type=int, metavar="N", help="epochs in which the rate grows to that")
    change("--milestones", type=int, nargs="*", metavar="EPOCH", help="epochs from which on it is a tenth")
    change("--weight-decay", type=float, metavar="SHARE")
    change("--momentum", type=float, metavar="SHARE", help="Nesterov momentum of SGD")
    change("--period", type=positive, metavar="STEPS", help="inner steps between averages; the first of AdaComm")
    change("--slow-momentum", type=float, metavar="BETA", help="of SlowMo")
    change("--interval-seconds", type=float, metavar="SECONDS", help="time between AdaComm's decisions")
    options: argparse.Namespace = recipe_flags.parse(parser, PRESETS, listing)
    return options
