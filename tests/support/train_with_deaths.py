"""Trains on handwritten digits in an elastic job, and kills some of its ranks at given or random points.

    cd tests/support
    mpirun --with-ft ulfm -np 4 python train_with_deaths.py torch --kill 2:exchange:17 --algorithm sgp
    mpirun --with-ft ulfm -np 4 python train_with_deaths.py tensorflow --seed-of-deaths 7 --deaths 2 --base osgp

``--kill`` is as in ``kill_points.parsed``; without it, ranks and moments are drawn. All other flags are the example's.
Each rank that lives to the end prints a line of JSON.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path

from kill_points import drawn, kill_at, parsed

EXAMPLES = Path(__file__).parents[2] / "examples"


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("framework", choices=("torch", "tensorflow"))
    parser.add_argument("--kill", action="append", default=[], metavar="NUMBER:METHOD:COUNT")
    parser.add_argument("--seed-of-deaths", type=int, default=0)
    parser.add_argument("--deaths", type=int, default=1)
    options, rest = parser.parse_known_args()
    sys.path.insert(0, str(EXAMPLES))
    common = importlib.import_module("digits_common")
    example = importlib.import_module(f"digits_{options.framework}")
    lt = importlib.import_module(f"lentando.{options.framework}")
    lt.init(elastic=True)
    number, began_with = lt.rank(), lt.size()
    for victim, method, count in parsed(options.kill) or drawn(options.seed_of_deaths, options.deaths, began_with):
        if number == 0:
            sys.stdout.write(f"rank {victim} dies at {method} {count:g}\n")
        if victim == number:
            sys.stdout.flush()
            kill_at(method, count)
    (run,) = example.main(common.arguments("", ["--elastic", "--no-table", *rest]))
    found = {
        "number": number,
        "rank": lt.rank(),
        "size": lt.size(),
        "accuracy": run.accuracy,
        "checksum": run.checksum,
        "losses": [loss for _, loss in run.epochs],
    }
    sys.stdout.write(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
