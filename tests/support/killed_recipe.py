"""Runs a recipe of examples/ as a rank of mpirun: ``killed_recipe.py RANK BATCHES SCRIPT ARGUMENTS ...``.

That rank kills itself when it is about to train on another batch after so many.
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
sys.path[:0] = [str(Path(script).parent), str(Path(script).parents[1])]

import recipe_loop  # noqa: E402 - what all recipes share

original = recipe_loop.train


def limited(lt: Any, course: Any, options: Any) -> Any:
    given, whole = count(1), course.batches

    def until_killed(*arguments: Any) -> Iterator[Any]:
        for batch in whole(*arguments):
            if next(given) > batches and int(os.environ["OMPI_COMM_WORLD_RANK"]) == rank:
                die()
            yield batch

    course.batches = until_killed
    return original(lt, course, options)


recipe_loop.train = limited
runpy.run_path(script, run_name="__main__")
