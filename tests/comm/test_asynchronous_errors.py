"""Asynchronous operations that fail in a way that no rank expects, and settings that change while they run."""

import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lentando.comm import operations
from lentando.comm.asynchronous import Handle, close_operations, open_operations, submissions
from lentando.comm.asynchronous.in_turn import OperationsInTurn
from lentando.comm.errors import MismatchError, TransportError
from lentando.comm.operations import Sum, collective
from lentando.comm.stall import begin_inspection, end_inspection
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transport import Transport
from lentando.comm.transports.single import SingleTransport
from lentando.comm.world import simulated_rank

pytestmark = pytest.mark.timeout(120)


class Failing:
    """An operation that fails on every rank."""

    operation, arguments, summation, description = "failing", (), None, '["failing"]'

    def __init__(self, name: str, error: BaseException) -> None:
        self.name = name
        self._error = error

    def execute(self, transport: Transport) -> None:
        raise self._error


@pytest.mark.parametrize("kind", [ValueError, TransportError])
def test_each_wait_raises_an_unexpected_error_of_the_operation(
    kind: type[Exception], caplog: pytest.LogCaptureFixture
) -> None:
    def program(transport: ThreadTransport) -> None:
        handle: Handle[Any] = OperationsInTurn(transport).submit(Failing("x", kind("no memory")))
        for _ in range(2):
            with pytest.raises(kind, match="no memory"):
                handle.wait()
        assert handle.poll()

    run_ranks(2, program)
    assert not caplog.records


def test_a_wait_raises_an_unexpected_error_of_another_operation() -> None:
    """The other one is executed within this wait, and ranks do not agree any more."""

    def program(transport: ThreadTransport) -> None:
        mine = OperationsInTurn(transport)
        other: Handle[Any] = mine.submit(Failing("other", ValueError("no memory")))
        with simulated_rank(transport):
            handle = mine.submit(operations.allreduce_call(array := np.ones(1), Sum, name="x"))
            for failed in (handle, other):
                with pytest.raises(ValueError, match="no memory"):
                    failed.wait()
            handle.wait()
        assert array[0] == 2

    run_ranks(2, program)


def test_an_interrupted_operation_is_not_repeated() -> None:
    def program(transport: ThreadTransport) -> None:
        handle: Handle[Any] = OperationsInTurn(transport).submit(Failing("x", KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            handle.wait()
        with pytest.raises(TransportError, match=r"was interrupted in 'failing.x' by KeyboardInterrupt"):
            handle.wait()

    run_ranks(2, program)


def test_an_error_in_a_world_of_one_rank_is_raised_by_the_wait() -> None:
    handle: Handle[Any] = OperationsInTurn(SingleTransport()).submit(Failing("x", ValueError("no memory")))
    with pytest.raises(ValueError, match="no memory"):
        handle.wait()


class Recording(threading.local):
    """A timeline that is stopped after each time that a thread has looked for it."""

    is_found = False
    events = 0

    @property
    def active(self) -> "Recording | None":
        self.is_found = not self.is_found
        return self if self.is_found else None

    def begin(self, name: str, key: str) -> None:
        self.events += 1

    def finish(self, name: str, key: str) -> None:
        self.events += 1

    def mark_cycle(self) -> None:
        self.events += 1

    def recorded(self, name: str, function: Callable[..., Any], **args: Any) -> Callable[..., Any]:
        return function


def test_a_timeline_may_be_stopped_at_any_time(monkeypatch: pytest.MonkeyPatch) -> None:
    recording = Recording()
    for module in (submissions, collective):
        monkeypatch.setattr(module, "timeline", recording)

    def program(transport: ThreadTransport) -> int:
        with simulated_rank(transport):
            open_operations(transport)
            for number in range(4):
                call = operations.allreduce_call(array := np.ones(1), Sum)
                if number % 2:
                    call.run()
                else:
                    call.start().wait()
                assert array[0] == 2
            transport.barrier()
            close_operations(transport)
        return recording.events

    assert all(run_ranks(2, program))


@pytest.mark.parametrize("is_late", [True, False])
def test_a_blocked_thread_is_a_deadlock_if_no_other_thread_will_submit(
    monkeypatch: pytest.MonkeyPatch, is_late: bool
) -> None:
    """Rank 0 waits for a sum. On rank 1, a thread waits in a barrier; another one submits the sum late, or ends."""
    monkeypatch.setenv("LENTANDO_STALL_SECONDS", "1.5")  # each wait is inspected every 0.15 s

    def program(transport: ThreadTransport) -> float:
        with simulated_rank(transport):
            begin_inspection(transport)
            open_operations(transport)
            array = np.ones(1)
            call = operations.allreduce_call(array, Sum, name="x")
            thread, handles = None, []
            if transport.rank == 0:
                time.sleep(0.2)  # on rank 1, both threads wait
                operations.barrier_call(name="known").start()
                handle = call.start()
                if is_late:
                    handle.wait()
                else:
                    time.sleep(0.7)  # rank 1 reports already that it waits
                    with pytest.raises(MismatchError, match=r"rank 1: waits in a collective operation"):
                        handle.wait()
            else:

                def submit() -> None:
                    with simulated_rank(transport):
                        operations.barrier_call(name="known").start().wait()
                        if is_late:
                            time.sleep(1.5)  # longer than it takes to find a deadlock
                            handles.append(call.start())

                thread = threading.Thread(target=submit)
                thread.start()
                time.sleep(0.1)  # the other thread waits first
            operations.barrier()
            if thread is not None:
                thread.join(60)
            for handle in handles:
                handle.wait()
            transport.barrier()
            close_operations(transport)
            end_inspection(transport)
            return float(array[0])

    assert run_ranks(2, program) == ([2.0, 2.0] if is_late else [1.0, 1.0])
