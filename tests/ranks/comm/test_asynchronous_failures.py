"""Failures of asynchronous operations over MPI: each is an error on every rank, within a time limit."""

import gc
import logging
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from forking import succeeds_in_child

from lentando.comm import operations, world
from lentando.comm.asynchronous import close_operations, open_operations, operations_of
from lentando.comm.errors import MismatchError, TransportError
from lentando.comm.operations import Sum
from lentando.comm.transport import Transport

if world.transport().name != "mpi" or world.size() == 1:
    pytest.skip("these are failures between ranks of MPI", allow_module_level=True)

from lentando.comm.transports.mpi import MPITransport


@pytest.fixture
def own_transport() -> Iterator[MPITransport]:
    """A transport whose asynchronous operations may break."""
    own = MPITransport()
    open_operations(own)
    yield own
    world.transport().barrier()
    close_operations(own)


class FailingCall:
    """An operation that fails on the last rank, while the others wait for it."""

    operation, name, summation, description = "broken", None, None, '["broken"]'

    def __init__(self, error: Exception) -> None:
        self.error = error
        self.arguments: list[Any] = []

    def execute(self, transport: Transport) -> None:
        if transport.rank == transport.size - 1:
            raise self.error
        transport.allgather(np.ones(1))


def test_an_exception_on_one_rank_is_an_error_on_all(own_transport: MPITransport) -> None:
    mine = operations_of(own_transport)
    started = time.monotonic()
    failing, other = mine.submit(FailingCall(MemoryError("no memory left"))), mine.submit(FailingCall(ValueError()))
    expected = rf"rank {own_transport.size - 1} has failed in .*: MemoryError: no memory left"
    for handle in (failing, other, failing):
        with pytest.raises(TransportError, match=expected):
            handle.wait()
    with pytest.raises(TransportError, match=expected):
        mine.submit(FailingCall(ValueError()))
    assert time.monotonic() - started < 60


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_neither_submits_nor_waits() -> None:
    waiting = operations.allreduce_call(np.ones(1), Sum, name="parent's").start()

    def in_child() -> None:
        with pytest.raises(TransportError, match="was made by fork from rank"):
            operations.allreduce_call(np.ones(1), Sum).start()
        if not waiting.poll():
            with pytest.raises(TransportError, match="was made by fork from rank"):
                waiting.wait()

    assert succeeds_in_child(in_child)
    waiting.wait()


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_does_not_wait_for_a_lock_that_another_thread_had() -> None:
    locked, is_over = threading.Event(), threading.Event()
    changed = operations_of(world.transport())._submissions.changed  # type: ignore[attr-defined]  # that of its thread

    def hold() -> None:
        with changed:
            locked.set()
            is_over.wait(20)

    def in_child() -> None:
        for call in (operations.allreduce_call(np.ones(1), Sum).start, operations.join):
            with pytest.raises(TransportError, match="was made by fork from rank"):
                call()

    threading.Thread(target=hold).start()
    locked.wait()
    assert succeeds_in_child(in_child)
    is_over.set()


def test_an_error_that_the_program_does_not_wait_for_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR, "lentando"):
        handle = operations.allreduce_call(np.ones(1 + world.rank()), Sum, name="forgotten").start()
        while not handle.poll():
            time.sleep(0.001)
        del handle
        gc.collect()
    assert "'allreduce.forgotten' has failed, and the program has not waited for it: the ranks" in caplog.text


def test_a_dropped_handle_keeps_its_arrays_until_the_end() -> None:
    if world.rank() == 0:
        time.sleep(0.05)
    array = np.ones(100_000)
    operations.allreduce_call(array, Sum, name="dropped").start()
    gc.collect()
    operations.allreduce_call(np.ones(1), Sum, name="after").start().wait()
    deadline = time.monotonic() + 5
    while array[-1] != world.size() and time.monotonic() < deadline:
        time.sleep(0.001)
    assert (array == world.size()).all()


def test_operations_that_are_in_flight_when_all_leave_get_an_error(own_transport: MPITransport) -> None:
    call = operations.allreduce_call(np.ones(1), Sum, name=f"only rank {own_transport.rank}")
    handle = operations_of(own_transport).submit(call)
    close_operations(own_transport)
    with pytest.raises(MismatchError, match=f"of rank {own_transport.rank} was not executed: the job has ended"):
        handle.wait()
