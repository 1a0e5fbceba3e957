"""Whole jobs over Horovod's engine, from start to end, good or bad; next to Horovod as the program uses it."""

import textwrap

import pytest
from launchers import HOROVOD_GLOO
from launching import Job

SECONDS = 90.0
"""In which a job must have ended when one of its ranks cannot continue."""

BEGIN = """
import os, sys, time
import numpy as np
from lentando.comm import world
from lentando.comm.agreement import Event, Intent, agree
from lentando.comm.errors import TransportError
world.init()
rank, size = world.rank(), world.size()
def exchange():
    received = np.empty(1)
    world.transport().exchange([((rank + 1) % size, np.ones(1))], [((rank - 1) % size, received)]).wait()
    assert received[0] == 1
exchange()
"""
ROUND = "agree(world.transport(), Intent(Event.ROUND, round=3), lambda: 'begins round 3')\n"
WRITE = r"sys.stdout.write(f'done {world.rank()} of {world.size()}\n')" + "\n"


def job(program: str, size: int = 2) -> Job:
    return HOROVOD_GLOO.run(size, "-c", program, timeout_seconds=120, prepared="lentando.torch")


def ends_well(program: str) -> None:
    found = job(program)
    assert found.status == 0, found.output
    assert all(found.output.count(f"done {rank} of 2") == 1 for rank in range(2)), found.output
    assert "Error" not in found.output


def test_job_can_be_joined_again_after_it_was_left() -> None:
    use_former = """
try:
    former.exchange([], [(1 - rank, np.empty(1))])
except RuntimeError as error:
    assert 'communicates after its job has ended' in str(error)
else:
    raise AssertionError('the former transport waits for a message')
"""
    ends_well(BEGIN + "former = world.transport()\nworld.shutdown()\nworld.init()\nexchange()\n" + use_former + WRITE)


@pytest.mark.parametrize("order", ["before", "after"])
def test_horovod_is_the_programs_too(order: str) -> None:
    """Who initialised it first does not matter."""
    start = "import horovod.torch as hvd\nhvd.init()\n"
    use = "import torch\nassert hvd.allreduce(torch.ones(2), op=hvd.Sum, name='theirs').tolist() == [2, 2]\n"
    begin = start + BEGIN if order == "before" else BEGIN + start
    ends_well(begin + use + "exchange()\n" + ROUND + WRITE)


def test_results_in_flight_survive_another_init() -> None:
    """``hvd.init()`` forgets the outputs of what is in flight; a rank cannot know whether another has begun a round."""
    program = """
import sys
import numpy as np
import horovod.torch as hvd
from lentando.comm.transports.horovod.binding import finish
from lentando.comm.transports.horovod.torch_binding import open_binding
binding = open_binding()
rank, size = binding.rank(), binding.size()
word = np.array([rank + 1])
started = binding.alltoall("words", np.arange(2) + 10 * rank, [1, 1]), binding.allreduce("word", word, "sum")
hvd.init()
assert finish(started[0]).tolist() == [rank, 10 + rank]
assert finish(started[1]).tolist() == [3]
hvd.shutdown()
sys.stdout.write(f'done {rank} of {size}\\n')
"""
    ends_well(program)


def test_horovod_is_never_the_last_owner_of_a_tensor_that_releases_it() -> None:
    """Its background thread would need Python's lock for that, and when it ends it may wait for the lock for ever."""
    program = """
import sys, time
import numpy as np
import torch
from horovod.torch import mpi_ops
from lentando.comm.transports.horovod.torch_binding import open_binding
binding = open_binding()
rank, size = binding.rank(), binding.size()
def owners(value):
    if isinstance(value, torch.Tensor):
        return [value._use_count()]
    return [count for item in value for count in owners(item)]
for is_inference in (False, True):
    with torch.inference_mode(is_inference):
        begun = [
            binding.allreduce("sum", np.ones(4), "sum"),
            binding.broadcast("root", np.ones(4, np.uint8), 0),
            binding.allgather("all", np.ones(rank + 1, np.uint8)),
            binding.alltoall("words", np.arange(2), [1, 1]),
        ]
    while not all(collective.done() for collective in begun):
        time.sleep(0.01)
    time.sleep(0.1)  # Horovod has released its tensors
    for collective in begun:
        _, *tensors = mpi_ops._handle_map[collective._handle]
        assert min(owners(tensors)) == 2, owners(tensors)
    assert [collective.result().size for collective in begun] == [4, 4, 3, 2]
sys.stdout.write(f'done {rank} of {size}\\n')
"""
    ends_well(program)


def test_program_may_shut_horovod_down_after_us() -> None:
    ends_well(BEGIN + "import horovod.torch as hvd\n" + WRITE + "world.shutdown()\nhvd.shutdown()\n")


def test_rank_that_raises_while_others_wait_for_its_message_ends_the_job() -> None:
    wait = "world.transport().exchange([], [(1, np.empty(1))]).wait()\n"
    found = job(BEGIN + "if rank == 1: raise ValueError('boom')\n" + wait)
    assert found.status not in (0, None)
    assert "ValueError: boom" in found.output
    assert "Lentando: rank 1 failed (ValueError) and ends the job" in found.output
    assert found.seconds < SECONDS


@pytest.mark.parametrize("wait", ["exchange()", "world.transport().barrier()"])
def test_rank_that_disappears_is_an_error_on_the_others(wait: str) -> None:
    # horovodrun ends the others when a rank fails; one that ends well it lets go, and they find out.
    # Rank 0 may still be in the first exchange when rank 1 has completed it.
    leave = "if rank == 1:\n    time.sleep(1)\n    os._exit(0)\n"
    attempt = textwrap.indent(f"exchange()\n{leave}{wait}\n", "    ")
    report = "sys.stdout.write(f'reported {rank}: {error}\\n')\n    sys.stdout.flush()\n    os._exit(3)\n"
    found = job(BEGIN + f"try:\n{attempt}except TransportError as error:\n    {report}")
    assert found.status not in (0, None)
    assert "reported 0: Horovod failed" in found.output, found.output
    assert found.seconds < SECONDS


def test_rank_that_ends_before_a_round_is_named() -> None:
    found = job(BEGIN + "if rank == 1: sys.exit()\n" + ROUND)
    assert found.status not in (0, None)
    assert "rank 0: begins round 3; rank 1: has ended (shutdown, or the end of the program)" in found.output
    assert found.seconds < SECONDS
