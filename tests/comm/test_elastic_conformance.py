"""MPI whose ranks may die keeps every promise of the ``Elastic`` protocol: real processes, ended by SIGKILL."""

import sys

import pytest
from launching import find_mpirun, launch

PROGRAM = """
import os, signal
from lentando.comm import world
from lentando.comm.testing import check_elastic

def die():
    os.kill(os.getpid(), signal.SIGKILL)

world.init(elastic=True)
check_elastic(world.transport(), die)
print("kept, with", world.size(), "left")
"""


@pytest.mark.parametrize("size", [1, 2, 4, 7])
def test_mpi_keeps_every_promise_of_the_elastic_protocol(size: int) -> None:
    command = [find_mpirun(), "--with-ft", "ulfm", "-np", str(size), sys.executable, "-c", PROGRAM]
    job = launch(command, timeout_seconds=100)
    assert job.status is not None, job.output
    assert job.output.count("kept, with 1 left") == 1, job.output
