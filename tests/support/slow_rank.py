"""Trains on all ranks of a job, one of which computes three times as long as the others: for tests of timelines."""

import sys
import time

import numpy as np
from numpy_model import Worker

from lentando.comm import world
from lentando.optimizers.rules.local_sgd import LocalSGD

SLOW = int(sys.argv[1])
STEP_SECONDS = 0.08
"""So long that no other rank comes last in a round because its core was busy with something else."""


def gradient(rank: int, _step: int, x: np.ndarray) -> np.ndarray:
    time.sleep(STEP_SECONDS * (3 if rank == SLOW else 1))
    return 0.1 * x


world.init()
worker = Worker(world.transport(), gradient, np.ones(1000), lambda _: 0.1, base=LocalSGD(), period=2)
worker.run(16)
world.shutdown()
