"""The order of the operations of one rank: what is sent ahead, and what continues after an operation."""

import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import timedelta

import pytest

from lentando.c10d.order import Order
from lentando.c10d.work import CollectiveWork
from lentando.comm.errors import TransportError


@pytest.fixture
def polls() -> list[str]:
    """The threads that have let messages continue."""
    return []


@pytest.fixture
def order(polls: list[str]) -> Iterator[Order]:
    made = Order("ordered", lambda: polls.append(threading.current_thread().name))
    yield made
    assert made.close(10.0)


def work(name: str) -> CollectiveWork:
    return CollectiveWork(name, [], 10.0, time.monotonic)


def test_next_operation_sends_ahead_once_while_the_one_before_it_waits(order: Order) -> None:
    happened: list[str] = []
    begun, all_are_submitted = threading.Event(), threading.Event()

    def first() -> None:
        begun.set()
        assert all_are_submitted.wait(10.0)
        happened.append("first")
        order.send_ahead()
        order.send_ahead()
        happened.append("first ends")

    works = [work(name) for name in ("first", "second", "third")]
    order.submit(works[0], first, at_once=False)
    assert begun.wait(10.0)
    order.submit(
        works[1], lambda: happened.append("second"), at_once=False, send_ahead=lambda: happened.append("ahead")
    )
    order.submit(works[2], lambda: happened.append("third"), at_once=True)
    all_are_submitted.set()
    for each in works:
        each.wait()
    assert happened == ["first", "ahead", "first ends", "second", "third"]


@pytest.mark.parametrize("at_once", [True, False])
def test_messages_continue_after_an_operation_for_as_long_as_it_took(
    order: Order, polls: list[str], at_once: bool
) -> None:
    done = work("operation")
    order.submit(done, lambda: time.sleep(0.3), at_once=at_once)
    done.wait()
    deadline = time.monotonic() + 10.0
    while len(polls) < 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert set(polls) == {"ordered"}
    count = 0
    while count != (count := len(polls)):  # an operation, and so what follows, may take longer on a busy machine
        assert time.monotonic() < deadline
        time.sleep(0.2)


@pytest.mark.parametrize("error", [TransportError("the job has ended"), ValueError("unexpected")])
def test_operations_follow_although_messages_cannot_continue(error: Exception) -> None:
    """Whether they fail then is up to them, unless the error is unexpected and would not be raised elsewhere."""
    tried = threading.Event()

    def fail() -> None:
        tried.set()
        raise error

    order, first, second = Order("ordered", fail), work("first"), work("second")
    order.submit(first, lambda: time.sleep(0.1), at_once=False)
    assert tried.wait(10.0)
    order.submit(second, lambda: None, at_once=False)
    with nullcontext() if isinstance(error, TransportError) else pytest.raises(ValueError, match="unexpected"):
        assert second.wait(timedelta(seconds=5))
    assert order.close(10.0)


def test_nothing_continues_within_a_node() -> None:
    order = Order("ordered")
    done = work("operation")
    order.submit(done, lambda: None, at_once=True)
    done.wait()
    assert order.close(10.0)
    assert "ordered" not in {thread.name for thread in threading.enumerate()}
