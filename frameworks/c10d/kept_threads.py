"""Threads that are kept from one function to the next, because a new thread has to get a processor first."""

import os
import threading
from collections.abc import Callable
from queue import SimpleQueue

__all__ = ["KeptThreads"]


class KeptThreads:
    """Threads that each call one function at a time.

    A function never waits for another one: if all threads are busy, one more is started. A function that raises an
    exception ends its thread, which reports it as any thread does. The threads do not keep the process from ending:
    ``wait`` waits for functions that shall be complete before that.

    Args:
        name: name of the threads, for debuggers and profilers.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._begin()
        os.register_at_fork(after_in_child=self._begin)  # a child has none of these threads

    def call(self, function: Callable[[], object]) -> None:
        """Call a function on a thread that does nothing else meanwhile."""
        with self._changing:
            if self._idle:
                self._idle -= 1
            else:
                threading.Thread(target=self._run, name=self._name, daemon=True).start()
            self._busy += 1
        self._given.put(function)

    def wait(self, seconds: float) -> bool:
        """Wait for the functions that were given.

        Args:
            seconds: the longest time to wait.

        Returns:
            whether all are over.
        """
        with self._changing:
            return self._changing.wait_for(lambda: self._busy == 0, seconds)

    def _begin(self) -> None:
        self._given: SimpleQueue[Callable[[], object]] = SimpleQueue()
        self._changing = threading.Condition()
        self._idle = self._busy = 0

    def _run(self) -> None:
        while True:
            function = self._given.get()
            has_returned = False
            try:
                function()
                has_returned = True
            finally:
                del function  # which may hold the last reference to tensors of the user
                with self._changing:
                    self._busy -= 1
                    self._idle += has_returned
                    self._changing.notify_all()
