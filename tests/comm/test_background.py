"""Threads that work in the background: who waits for them, and what becomes of them when their owner is dropped."""

import subprocess
import sys
import threading
from typing import Any

import numpy as np
import pytest

from lentando.comm import background
from lentando.comm.asynchronous import close_operations, open_operations, operations_of
from lentando.comm.background import BackgroundThreads, start_background_threads
from lentando.comm.final_checks import take_problems, wait_before_leaving
from lentando.comm.operations import Sum, allreduce_call
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.world import simulated_rank

SECONDS = 5.0
"""Limit of a wait that ends at once."""


class Owner:
    """Dropped while its thread works."""


def started(transport: ThreadTransport, count: int = 1) -> BackgroundThreads:
    threads = start_background_threads(transport, count, "test-background")
    assert threads is not None
    return threads


def test_owner_may_be_dropped_by_the_thread_that_works_for_it() -> None:
    """Garbage collection does that, whichever thread it runs in."""

    def work(transport: ThreadTransport) -> None:
        owners = [Owner()]
        threads = started(transport)
        given: list[Any] = []
        wait_before_leaving(transport, owners[0], lambda: given)
        begun = threading.Event()

        def drop() -> None:
            begun.wait(SECONDS)
            owners.clear()

        given.append(threads.submit(0, drop))
        begun.set()
        assert given[0].result(SECONDS) is None

    run_ranks(1, work)


@pytest.mark.parametrize("is_dropped", [False, True])
def test_rank_that_leaves_waits_for_its_threads(is_dropped: bool) -> None:
    def work(transport: ThreadTransport) -> None:
        owner, threads, may_end = Owner(), started(transport), threading.Event()
        future = threads.submit(0, lambda: may_end.wait(SECONDS))
        wait_before_leaving(transport, owner, lambda: [future])
        if is_dropped:
            del owner
        assert not future.done()
        threading.Timer(0.05, may_end.set).start()
        assert take_problems(transport) == []
        assert future.result(0) is True

    run_ranks(1, work)


def test_threads_work_until_the_rank_has_left_the_job() -> None:
    """Also if what ends the objects of a program was registered later, and is therefore called first."""
    program = f"""
import atexit
atexit.register(lambda: print(threads.submit(0, lambda: "left").result({SECONDS})))
from lentando.comm.background import start_background_threads
from lentando.comm.testing import run_ranks
threads, = run_ranks(1, lambda transport: start_background_threads(transport, 1, "test"))
threads.submit(0, lambda: None).result()
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False)
    assert ended.stdout == "left\n", ended.stderr


def test_work_that_no_thread_can_do_is_an_error_each_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The limit of threads (``ulimit -u``) does not hold for root, so that this test imitates it."""
    start, started_names = threading.Thread.start, list[str]()

    def start_one(thread: threading.Thread) -> None:
        if started_names:
            raise RuntimeError("can't start new thread")
        started_names.append(thread.name)
        start(thread)

    def work(transport: ThreadTransport) -> None:
        threads = started(transport, count=2)
        with monkeypatch.context() as limited:
            limited.setattr(threading.Thread, "start", start_one)
            for number in (1, 0):
                with pytest.raises(RuntimeError, match="can't start"):
                    threads.submit(number, lambda: None)
        assert threads.submit(1, lambda: "done").result(SECONDS) == "done"
        assert started_names == ["test-background"]

    run_ranks(1, work)


@pytest.fixture
def no_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 3.12 starts none at the end of a program, where ranks leave that have not called ``shutdown()``."""

    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(background, "Thread", refuse)


@pytest.mark.usefixtures("no_thread")
def test_rank_that_leaves_starts_no_thread() -> None:
    def work(transport: ThreadTransport) -> None:
        open_operations(transport)
        close_operations(transport)

    run_ranks(3, work, timeout_seconds=SECONDS)


@pytest.mark.usefixtures("no_thread")
@pytest.mark.parametrize("ranks", [{0}, {1}, {0, 1, 2}])
@pytest.mark.parametrize("is_join", [False, True])
def test_operation_for_which_no_thread_can_be_started_has_not_been_submitted(ranks: set[int], is_join: bool) -> None:
    """An atexit function may submit one. The rank must leave the job nevertheless."""

    def work(transport: ThreadTransport) -> None:
        open_operations(transport)
        mine: Any = operations_of(transport)
        if transport.rank in ranks:
            with simulated_rank(transport), pytest.raises(RuntimeError, match="can't create new thread"):
                mine.join(lambda _: None) if is_join else mine.submit(allreduce_call(np.ones(1), Sum, name="late"))
            assert mine.names_in_flight() == []
        close_operations(transport)

    run_ranks(3, work, timeout_seconds=SECONDS)
