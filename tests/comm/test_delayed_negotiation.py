"""Asynchronous operations whose background threads or messages are delayed, at the points where the order matters."""

import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import pytest

from lentando.comm import operations
from lentando.comm.asynchronous import Handle, close_operations, open_operations, operations_of
from lentando.comm.asynchronous.coordinator import Coordinator, Message
from lentando.comm.asynchronous.names_in_use import CLEARED_FROM, NamesInUse
from lentando.comm.asynchronous.negotiated import NegotiatedOperations
from lentando.comm.asynchronous.negotiation import Negotiation
from lentando.comm.errors import ConfigurationError, MismatchError
from lentando.comm.operations import Sum
from lentando.comm.process_sets import add_process_set
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transports.single import SingleTransport
from lentando.comm.world import simulated_rank

pytestmark = pytest.mark.timeout(120)


class Gates:
    """Holds the background threads of single ranks, which then neither send nor receive."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.is_open = [threading.Event() for _ in range(3)]
        for event in self.is_open:
            event.set()
        receive = ThreadTransport.receive_nowait

        def receive_if_open(transport: ThreadTransport) -> tuple[int, bytes] | None:
            assert self.is_open[transport.rank].wait(60)
            return receive(transport)

        monkeypatch.setattr(ThreadTransport, "receive_nowait", receive_if_open)

    def close(self, rank: int) -> None:
        """Hold the thread of a rank before it receives, and then sends, its next messages."""
        self.is_open[rank].clear()

    def open(self, rank: int) -> None:
        """Let the thread of a rank continue."""
        self.is_open[rank].set()


@pytest.fixture
def gates(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gates]:
    gates = Gates(monkeypatch)
    yield gates
    for rank in range(3):
        gates.open(rank)


def on_ranks(size: int, program: Callable[[ThreadTransport], Any]) -> list[Any]:
    def run(transport: ThreadTransport) -> Any:
        with simulated_rank(transport):
            open_operations(transport)
            result = program(transport)
            transport.barrier()
            close_operations(transport)
            return result

    return run_ranks(size, run)


def sum_of_ones(name: str | None) -> float:
    array = np.ones(1)
    operations.allreduce_call(array, Sum, name=name).start().wait()
    return float(array[0])


def settle() -> None:
    """Give background threads time to do what they can do."""
    time.sleep(0.1)


def join_in_vain(transport: ThreadTransport, joining: int) -> None:
    """A rank joins while the others do something else, which is an error on every rank."""
    call: Callable[[], object] = operations.join if transport.rank == joining else lambda: add_process_set([0])
    if transport.rank != joining:
        settle()  # until the other one has sent to rank 0 that it has joined
    with pytest.raises(MismatchError, match=r"has called join\(\)"):
        call()


@pytest.fixture
def late_cancellation(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank whose join has failed continues later than the others."""
    cancel = NegotiatedOperations.cancel_join

    def cancel_later(operations: NegotiatedOperations) -> None:
        settle()
        cancel(operations)

    monkeypatch.setattr(NegotiatedOperations, "cancel_join", cancel_later)


@pytest.mark.parametrize("held", [0, 1])
def test_a_rank_joins_again_before_its_thread_has_sent_anything(gates: Gates, held: int) -> None:
    def program(transport: ThreadTransport) -> int:
        if transport.rank == held:
            gates.close(held)
        join_in_vain(transport, held)
        if transport.rank == held:
            threading.Timer(0.1, gates.open, [held]).start()
        return operations.join()

    assert len(set(on_ranks(2, program))) == 1


@pytest.mark.parametrize("late", [0, 1])
@pytest.mark.usefixtures("late_cancellation")
def test_another_rank_joins_before_a_failed_join_has_been_cancelled(late: int) -> None:
    def program(transport: ThreadTransport) -> int:
        join_in_vain(transport, late)
        last = operations.join()
        operations.barrier()
        return last

    assert len(set(on_ranks(2, program))) == 1


@pytest.mark.parametrize("late", [0, 2])
@pytest.mark.usefixtures("late_cancellation")
def test_a_failed_join_contributes_no_zeros_to_later_operations(late: int) -> None:
    def program(transport: ThreadTransport) -> list[float]:
        join_in_vain(transport, late)
        return [sum_of_ones("x"), sum_of_ones(None)]

    assert on_ranks(3, program) == [[3.0, 3.0]] * 3


def test_a_failed_join_contributes_zeros_to_what_was_decided_before(
    gates: Gates, monkeypatch: pytest.MonkeyPatch
) -> None:
    has_joined, is_decided = threading.Event(), threading.Event()
    report, decide = Negotiation.report, Coordinator.decide

    def note_join(negotiation: Negotiation, message: Message) -> None:
        report(negotiation, message)
        if "join" in message:
            has_joined.set()

    def note_decision(coordinator: Coordinator) -> list[Message]:
        decisions = decide(coordinator)
        if any("run" in decision for decision in decisions):
            is_decided.set()
        return decisions

    monkeypatch.setattr(Negotiation, "report", note_join)
    monkeypatch.setattr(Coordinator, "decide", note_decision)

    def program(transport: ThreadTransport) -> float:
        handle, array = None, np.ones(1)
        if transport.rank != 2:
            assert has_joined.wait(60)
            if transport.rank == 0:
                gates.close(2)
            handle = operations.allreduce_call(array, Sum, name="x").start()
            assert is_decided.wait(60)
        join_in_vain(transport, 2)
        if handle is not None:
            gates.open(2)
            handle.wait()
            assert array[0] == 2
        return sum_of_ones("x")

    assert on_ranks(3, program) == [3.0] * 3


def test_calls_without_a_name_are_matched_after_a_failed_join() -> None:
    def program(transport: ThreadTransport) -> float:
        if transport.rank != 0:
            assert sum_of_ones(None) == 2
            assert sum_of_ones(None) == 2
        join_in_vain(transport, 0)
        return sum_of_ones(None)

    assert on_ranks(3, program) == [3.0] * 3


def test_an_error_is_not_that_of_a_later_operation_of_the_same_name() -> None:
    """Rank 1 receives the report of a deadlock when it is in it no longer."""
    has_failed = threading.Event()

    def program(transport: ThreadTransport) -> float:
        if transport.rank == 0:
            with pytest.raises(MismatchError, match=r"rank 0: waits for 'allreduce.x' .*; rank 1: waits in a call"):
                sum_of_ones("x")
            has_failed.set()
        else:
            while not has_failed.wait(0.5):
                operations_of(transport).inspect(("a call", 1.0))
        transport.barrier()
        return sum_of_ones("x")

    assert on_ranks(2, program) == [2.0] * 2


def test_a_blocking_call_that_has_ended_is_not_a_deadlock() -> None:
    """The report of a wait may arrive after its end, when the other rank already waits for what follows."""

    def program(transport: ThreadTransport) -> float:
        if transport.rank == 1:
            for began in (1.0, 2.0):
                time.sleep(0.6)
                operations_of(transport).inspect(("a call", began))
            time.sleep(0.6)
        return sum_of_ones("x")

    assert on_ranks(2, program) == [2.0] * 2


@pytest.mark.parametrize("is_kept", [True, False])
def test_a_name_that_is_submitted_twice_is_an_error_on_every_rank(is_kept: bool) -> None:
    """On the last rank, the first operation is complete before the second one is submitted."""

    def program(transport: ThreadTransport) -> float:
        if transport.rank == 1:
            settle()
        handle = operations.allreduce_call(np.ones(1), Sum, name="x").start()
        if not is_kept:
            del handle
        if transport.rank == 1:
            settle()
        with pytest.raises(ConfigurationError, match=r"named 'allreduce.x' while an earlier one of that name"):
            operations.allreduce_call(np.ones(1), Sum, name="x").start()
        if is_kept:
            handle.wait()
        else:
            operations.barrier()
        while True:
            with suppress(ConfigurationError):  # the name is free once the background thread has executed the first one
                return sum_of_ones("x")
            settle()

    assert on_ranks(2, program) == [2.0] * 2


def test_poll_frees_a_name() -> None:
    def program(transport: ThreadTransport) -> float:
        handle = operations.allreduce_call(np.ones(1), Sum, name="x").start()
        while not handle.poll():
            time.sleep(0.001)
        return sum_of_ones("x")

    assert on_ranks(2, program) == [2.0] * 2


class Noting:
    """An executor of operations that are complete, which notes that the program has seen it."""

    def __init__(self, names: NamesInUse) -> None:
        self.note_seen = names.see

    def wait_for(self, handle: Handle[Any]) -> None:
        raise AssertionError("the operation is complete")

    poll_for = wait_for


def test_names_that_are_free_again_are_forgotten() -> None:
    names = NamesInUse(SingleTransport())
    executor = Noting(names)
    handles = [Handle[None](str(number), executor) for number in range(3 * CLEARED_FROM)]
    for number, handle in enumerate(handles):
        names.hold(handle.key, handle)
        if number > 0:
            handle.succeed(None)
            handle.wait()
    assert names.is_held("0")
    assert not names.is_held("1")
    assert len(names) <= CLEARED_FROM


@pytest.mark.parametrize("joined", [0, 1])
def test_a_rank_that_has_joined_contributes_zeros_to_asynchronous_sums(joined: int) -> None:
    def program(transport: ThreadTransport) -> float:
        total = 0.0 if transport.rank == joined else sum_of_ones("x") + sum_of_ones(None)
        assert operations.join() == 1 - joined
        return total

    assert sum(on_ranks(2, program)) == 2


def test_a_join_is_cancelled_after_rank_0_has_received_it_from_all_ranks() -> None:
    coordinator = Coordinator([0, 1])
    for rank in (0, 1):
        coordinator.receive(rank, {"join": 0})
    assert coordinator.decide() == [{"joined": 1}]
    for rank in (0, 1):
        coordinator.receive(rank, {"round": 1})
    assert coordinator.decide() == [{"round": 1}]
    coordinator.receive(1, {"join": 1})
    assert coordinator.decide() == []
    coordinator.receive(0, {"join": 1})
    assert coordinator.decide() == [{"joined": 0}]
