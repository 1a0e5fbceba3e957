"""What a program can still call when its job has ended: by ``shutdown()``, or because it has finalised MPI itself."""

import pytest
from launching import mpirun

ENDED = "communicates after its job has ended, by shutdown() or because the program has called MPI.Finalize()"

AFTER_SHUTDOWN = """
import numpy as np
from lentando.comm import world
from lentando.comm.errors import NotInitializedError
world.init()
old = world.transport()
for_thread = old.for_thread()  # from here on it waits without using the processor, by other calls of MPI
old.barrier()
world.shutdown()
world.shutdown()
world.init()
new, peer, one = world.transport(), 1 - world.rank(), np.ones(1)
for ended in filter(None, (old, for_thread)):
    for call in (
        lambda: ended.allgather(one), lambda: ended.allreduce(one), lambda: ended.broadcast(one), ended.barrier,
        lambda: ended.exchange([(peer, one)], [(peer, np.empty(1))]), ended.node_barrier, ended.for_thread,
    ):
        try:
            call()
        except NotInitializedError as error:
            assert f"rank {world.rank()} " in str(error), error
            print(error)
        else:
            raise AssertionError("no error")
    ended.close()
assert new.allgather(one).sum() == 2
"""

FINALIZED = """
import mpi4py
mpi4py.rc.initialize = mpi4py.rc.finalize = False
from mpi4py import MPI
MPI.Init()
import numpy as np
import lentando.torch as lt
import torch
lt.init()
optimizers = []
for base in (lt.AllReduce(), lt.AllReduce(overlap=True), lt.SGP()):
    model = torch.nn.Linear(2, 2)
    sgd = torch.optim.SGD(model.parameters(), 0.1)
    optimizers.append((model, lt.DistributedOptimizer(sgd, model=model, base=base)))

def step(model, optimizer):
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()

for model, optimizer in optimizers:
    step(model, optimizer)
MPI.Finalize()
for model, optimizer in optimizers:
    try:
        step(model, optimizer)
    except lt.NotInitializedError as error:
        print(error)
    else:
        raise AssertionError("no error")
if shut_down:
    lt.shutdown()
    assert not lt.is_initialized()
"""


def test_what_communicates_after_shutdown_is_an_error_that_says_so() -> None:
    job = mpirun(2, "-c", AFTER_SHUTDOWN)
    assert job.status == 0, job.output
    assert job.output.count(ENDED) in (14, 28)  # where MPI lets one thread in only, there is no second transport


@pytest.mark.parametrize("shut_down", [False, True])
def test_program_that_finalizes_mpi_ends_well(shut_down: bool) -> None:
    job = mpirun(2, "-c", f"shut_down = {shut_down}\n" + FINALIZED, prepared="lentando.torch")
    assert job.status == 0, job.output
    assert job.output.count(ENDED) == 6


def test_exception_after_finalize_is_the_users_alone() -> None:
    program = "shut_down = False\n" + FINALIZED + "raise ValueError('afterwards')\n"
    job = mpirun(2, "-c", program, prepared="lentando.torch")
    assert job.output.count("ValueError: afterwards") >= 1
    assert "Lentando:" not in job.output
