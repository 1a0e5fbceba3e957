"""Threads that complete futures: kept, never one too few, and gone with the process."""

import os
import subprocess
import sys
import threading
from queue import SimpleQueue

import pytest

from lentando.c10d.kept_threads import KeptThreads

SECONDS = 60.0


def test_one_thread_calls_one_function_after_the_other() -> None:
    threads = KeptThreads("kept")
    found: SimpleQueue[threading.Thread] = SimpleQueue()
    for _ in range(5):
        threads.call(lambda: found.put(threading.current_thread()))
        assert threads.wait(SECONDS)
    by = [found.get_nowait() for _ in range(5)]
    assert len(set(by)) == 1
    assert by[0].name == "kept"


def test_a_function_never_waits_for_one_that_was_given_before() -> None:
    """Each waits for the next one, the first of them on a thread that is kept."""
    threads = KeptThreads("kept")
    threads.call(lambda: None)
    assert threads.wait(SECONDS)
    events = [threading.Event() for _ in range(50)]

    def after_the_next(number: int) -> None:
        if number + 1 < len(events):
            assert events[number + 1].wait(SECONDS)
        events[number].set()

    for number in range(len(events)):
        threads.call(lambda number=number: after_the_next(number))  # type: ignore[misc]
    assert events[0].wait(SECONDS)
    assert threads.wait(SECONDS)


def test_an_exception_is_reported_and_others_are_still_called(monkeypatch: pytest.MonkeyPatch) -> None:
    reported: SimpleQueue[type[BaseException]] = SimpleQueue()
    monkeypatch.setattr(threading, "excepthook", lambda arguments: reported.put(arguments.exc_type))
    threads = KeptThreads("kept")
    for _ in range(3):
        threads.call(lambda: 1 // 0)
        assert reported.get(timeout=SECONDS) is ZeroDivisionError
    called = threading.Event()
    threads.call(called.set)
    assert called.wait(SECONDS)
    assert threads.wait(SECONDS)


def test_what_is_not_over_in_time_is_reported_to_who_waits() -> None:
    threads = KeptThreads("kept")
    release = threading.Event()
    threads.call(lambda: release.wait(SECONDS))
    assert not threads.wait(0.05)
    release.set()
    assert threads.wait(SECONDS)


def test_a_child_of_a_fork_starts_threads_of_its_own() -> None:
    threads = KeptThreads("kept")
    threads.call(lambda: None)
    assert threads.wait(SECONDS)
    child = os.fork()
    if child == 0:
        called = threading.Event()
        threads.call(called.set)
        os._exit(0 if called.wait(10.0) and threads.wait(10.0) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_neither_threads_that_wait_nor_busy_ones_keep_a_process_from_ending() -> None:
    program = """
import threading, time
from lentando.c10d.kept_threads import KeptThreads
threads = KeptThreads("kept")
threads.call(lambda: None)
threads.wait(60)
threads.call(lambda: None)
threads.call(lambda: time.sleep(1000))
"""
    subprocess.run([sys.executable, "-c", program], timeout=SECONDS, check=True)
