"""Exchanges over Gloo, whose own thread moves the messages while the caller computes.

Gloo reports that a message has arrived only to a thread that waits for it. One that asks without waiting (``test``,
``wait_for``), or does something meanwhile, therefore lets another thread wait.
"""

import threading
import time
from collections.abc import Callable, Sequence
from queue import SimpleQueue

from lentando.comm.errors import TransportError
from lentando.comm.transports.mailbox import Receive
from lentando.comm.transports.torch_distributed.errors import TranslatedErrors
from lentando.comm.transports.torch_distributed.groups import Work

__all__ = ["TorchExchange", "WaitingThreads"]


class TorchExchange:
    """Messages in flight.

    Args:
        works: the messages to and from other ranks, each with the number of that rank. They refer to their tensors.
        receives: posted receives from this rank itself.
        threads: threads that can wait for the messages.
        pause: function that is called again and again by a thread that waits; None to wait inside of Gloo.
    """

    def __init__(
        self,
        works: list[tuple[int, Work]],
        receives: Sequence[Receive],
        threads: "WaitingThreads",
        pause: Callable[[], None] | None,
    ) -> None:
        self._works = works
        self._receives = receives
        self._threads = threads
        self._pause = pause
        self._has_ended: threading.Event | None = None
        self._error: TransportError | None = None

    def wait(self) -> None:
        if self._pause is None and self._has_ended is None:
            self._complete()
        elif self._works:
            has_ended = self._watch()
            if self._pause is None:
                has_ended.wait()
            else:
                while not has_ended.is_set():
                    self._pause()
        self._raise_errors()

    def wait_for(self, seconds: float) -> bool:
        """Wait for ``seconds`` at most; return whether the exchange is complete."""
        if self._works:
            has_ended, until = self._watch(), time.monotonic() + seconds
            if self._pause is None:
                has_ended.wait(seconds)
            else:
                while not has_ended.is_set() and time.monotonic() < until:
                    self._pause()
        return self.test()

    def test(self) -> bool:
        if self._works and not self._watch().is_set():
            return False
        if self._error is not None:
            raise self._error
        return all(receive.is_filled for receive in self._receives)

    def _raise_errors(self) -> None:
        if self._error is not None:
            raise self._error
        if not all(receive.is_filled for receive in self._receives):
            raise TransportError("waiting for a message from this rank itself that has not been sent")

    def _watch(self) -> threading.Event:
        """Let another thread wait. Returns the event that is set when it has ended."""
        if self._has_ended is None:
            self._has_ended = threading.Event()
            self._threads.run(self._complete_and_report)
        return self._has_ended

    def _complete_and_report(self) -> None:
        assert self._has_ended is not None
        self._complete()
        self._has_ended.set()

    def _complete(self) -> None:
        try:
            while self._works:
                peer, work = self._works[-1]
                with TranslatedErrors(peer):
                    work.wait()
                self._works.pop()
        except TransportError as error:
            self._error = error


class WaitingThreads:
    """Threads that call a function each, and are reused: as many as functions run at once."""

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._idle = 0
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._lock = threading.Lock()

    def run(self, function: Callable[[], None]) -> None:
        """Let a thread call a function, which raises no exception."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                self._threads.append(threading.Thread(target=self._run, name="lentando-waiting", daemon=True))
                self._threads[-1].start()
        self._queue.put(function)

    def close(self) -> None:
        """End the threads once their functions have returned."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()

    def _run(self) -> None:
        while (function := self._queue.get()) is not None:
            function()
            del function  # which may hold the last reference to arrays
            with self._lock:
                self._idle += 1
