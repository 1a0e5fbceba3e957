"""Two threads of a rank that communicate: no mixed messages, no wrong sum, no hang."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lentando.comm import operations, world
from lentando.comm.agreement import Event, Intent, agree
from lentando.comm.elastic import transaction
from lentando.comm.errors import LentandoError, MismatchError
from lentando.comm.job import job_of
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.turns import Turns, turn


def in_thread(function: Callable[[], Any], name: str) -> "Outcome":
    outcome = Outcome()

    def run() -> None:
        try:
            outcome.result = function()
        except LentandoError as error:
            outcome.error = error

    outcome.thread = threading.Thread(target=run, name=name, daemon=True)
    outcome.thread.start()
    return outcome


class Outcome:
    """What became of a call in a thread of its own."""

    thread: threading.Thread
    result: Any = None
    error: LentandoError | None = None

    def wait(self) -> "Outcome":
        self.thread.join(20)
        assert not self.thread.is_alive(), "the call hangs"
        return self


def total(transport: ThreadTransport, value: float, name: str | None = None) -> float:
    with world.simulated_rank(transport):
        array = np.array([value])
        operations.allreduce(array, operations.Sum, name)
    return float(array[0])


def waits_for_its_turn(transport: ThreadTransport, count: int = 2, first: "Outcome | None" = None) -> None:
    """Return when so many threads of this rank are at a call, or when the first call has ended already."""
    for _ in range(2000):
        turns = job_of(transport).find(Turns)
        if turns is not None and len(turns._calls) >= count:
            return
        if first is not None and not first.thread.is_alive():
            return
        threading.Event().wait(0.005)
    pytest.fail("the second thread did not come to its call")


def test_the_same_call_of_two_threads_at_once_is_an_error_on_every_rank() -> None:
    def work(transport: ThreadTransport) -> list[Outcome]:
        if transport.rank == 1:
            both_wait.wait(20)
            first = in_thread(lambda: total(transport, 1.0), "one").wait()
            return [first, in_thread(lambda: total(transport, 2.0), "two").wait()]
        outcomes = [in_thread(lambda v=v: total(transport, v), name) for v, name in ((1.0, "one"), (2.0, "two"))]
        waits_for_its_turn(transport)
        both_wait.set()
        return [outcome.wait() for outcome in outcomes]

    both_wait = threading.Event()
    (first, second), (_, later) = run_ranks(2, work)
    assert isinstance(first.error, MismatchError)
    assert isinstance(second.error, MismatchError)
    assert isinstance(later.error, MismatchError)
    assert {"'one'", "'two'"} <= set(str(first.error).split())
    assert "rank 1: calls allreduce([1], float64, sum)" in str(later.error)
    assert "as does its thread" in str(later.error)


def test_named_calls_of_two_threads_give_the_right_sums_or_an_error_on_every_rank() -> None:
    """However threads are scheduled: a name that differs never gets another's value."""

    def work(transport: ThreadTransport) -> list[Outcome]:
        def calls(value: float, name: str) -> list[float]:
            return [total(transport, value, name) for _ in range(20)]

        outcomes = [in_thread(lambda v=v, n=n: calls(v, n), n) for v, n in ((1.0, "one"), (2.0, "two"))]
        found = [outcome.wait() for outcome in outcomes]
        with world.simulated_rank(transport):
            pass
        return found

    for outcomes in run_ranks(2, work):
        for outcome, value in zip(outcomes, (1.0, 2.0), strict=True):
            if outcome.error is None:
                assert outcome.result == [2 * value] * 20


def test_calls_that_differ_may_overlap_when_ranks_make_them_in_one_order() -> None:
    def work(transport: ThreadTransport) -> list[Any]:
        if transport.rank == 1:
            both_wait.wait(20)
            return [total(transport, 1.0, "first"), total(transport, 2.0, "second")]
        first = in_thread(lambda: total(transport, 1.0, "first"), "first")
        waits_for_its_turn(transport, 1)
        second = in_thread(lambda: total(transport, 2.0, "second"), "second")
        waits_for_its_turn(transport)
        both_wait.set()
        return [first.wait().result, second.wait().result]

    both_wait = threading.Event()
    assert run_ranks(2, work) == [[2.0, 4.0]] * 2


def test_a_round_and_a_collective_in_another_order_are_an_error_on_both_ranks() -> None:
    """An optimizer's step in one thread, a collective in another."""

    def work(transport: ThreadTransport) -> list[Outcome]:
        def step() -> None:
            transaction(transport, lambda: agree(transport, Intent(Event.ROUND, round=3), lambda: "takes a step"))

        calls = [("step", step), ("sum", lambda: total(transport, 1.0))]
        first, second = calls if transport.rank else reversed(calls)
        one = in_thread(first[1], first[0])
        waits_for_its_turn(transport, 1, one)  # the ranks' first calls may meet, and fail, before this thread looks
        started.wait(20)
        two = in_thread(second[1], second[0])
        return [one.wait(), two.wait()]

    started = threading.Barrier(2)
    for outcomes in run_ranks(2, work):
        assert all(isinstance(outcome.error, MismatchError) for outcome in outcomes)


def test_a_call_inside_a_turn_is_part_of_it() -> None:
    def work(transport: ThreadTransport) -> float:
        with turn(transport):
            return total(transport, 1.0)

    assert run_ranks(2, work) == [2.0, 2.0]


def test_a_turn_ends_with_the_error_of_what_was_done_in_it() -> None:
    (transport,) = run_ranks(1, lambda transport: transport)
    with pytest.raises(ZeroDivisionError), turn(transport):
        1 / 0  # noqa: B018
    with turn(transport, "again"):
        assert job_of(transport).get(Turns).set_content("again") is None
    assert in_thread(lambda: total(transport, 1.0), "another").wait().result == 1.0


def test_training_in_one_thread_after_the_other_is_no_overlap() -> None:
    def work(transport: ThreadTransport) -> list[float]:
        return [in_thread(lambda: total(transport, 1.0), f"thread {k}").wait().result for k in range(5)]

    assert run_ranks(2, work) == [[2.0] * 5] * 2
