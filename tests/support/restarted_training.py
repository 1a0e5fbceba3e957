"""Runs an example as a rank of torchrun, and kills ranks: ``restarted_training.py SCRIPT FOLDER LIFE:RANK:STEPS ...``.

In each life of the job (0 is the first, 1 the one after the first restart), that rank kills itself after so many steps.
"""

import os
import runpy
import sys
from itertools import count
from typing import Any

import torch
from kill_points import die

script, folder, *deaths = sys.argv[1:]
here = (os.environ["TORCHELASTIC_RESTART_COUNT"], os.environ["RANK"])
mortal = {(life, rank): int(steps) for life, rank, steps in (death.split(":") for death in deaths)}
steps_taken = count(1)
take_step = torch.optim.SGD.step


def step(self: torch.optim.SGD, *arguments: Any, **options: Any) -> Any:
    result = take_step(self, *arguments, **options)
    if next(steps_taken) == mortal.get(here):
        die()
    return result


torch.optim.SGD.step = step  # type: ignore[assignment, method-assign]
sys.argv = [script, folder]
runpy.run_path(script, run_name="__main__")
