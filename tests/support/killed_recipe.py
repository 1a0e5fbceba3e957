"""Runs a recipe of examples/cifar as a rank of mpirun: ``killed_recipe.py RANK BATCHES SCRIPT ARGUMENTS ...``.

That rank kills itself when its loader is asked for another batch after so many.
"""

import os
import runpy
import sys
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any

from kill_points import die

rank, batches, script = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
sys.argv = sys.argv[3:]
sys.path.insert(0, str(Path(script).parent))

from loader import Loader  # noqa: E402 - in the folder of the recipe

given = count(1)
original = Loader.batches


def limited(self: Loader, *arguments: Any) -> Iterator[Any]:
    for batch in original(self, *arguments):
        if next(given) > batches and int(os.environ["OMPI_COMM_WORLD_RANK"]) == rank:
            die()
        yield batch


Loader.batches = limited  # type: ignore[method-assign]
runpy.run_path(script, run_name="__main__")
