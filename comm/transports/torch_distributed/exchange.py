"""Exchanges over Gloo, whose own thread moves the messages while the caller computes.

Gloo reports that a message has arrived only to a thread that waits for it. One that asks without waiting (``test``,
``wait_for``), or does something meanwhile, therefore lets another thread wait.
"""

import threading
import time
from collections.abc import Callable, Sequence

from lentando.comm.errors import TransportError
from lentando.comm.transports.mailbox import Receive
from lentando.comm.transports.torch_distributed.errors import TranslatedErrors
from lentando.comm.transports.torch_distributed.waiting import Messages, WaitingThreads

__all__ = ["TorchExchange"]


class TorchExchange:
    """An exchange. Its messages are in flight until they are complete, even if nothing refers to it any more.

    Args:
        messages: the messages to and from other ranks.
        receives: posted receives from this rank itself.
        threads: threads that can wait for the messages.
        pause: function that is called again and again by a thread that waits; None to wait inside of Gloo.
    """

    def __init__(
        self,
        messages: Messages,
        receives: Sequence[Receive],
        threads: WaitingThreads,
        pause: Callable[[], None] | None,
    ) -> None:
        self._messages = messages
        self._receives = receives
        self._threads = threads
        self._pause = pause
        self._has_ended: threading.Event | None = None
        self._error: TransportError | None = None

    def wait(self) -> None:
        if self._pause is None and self._has_ended is None:
            self._complete()
        elif self._messages:
            has_ended = self._watch()
            if self._pause is None:
                has_ended.wait()
            else:
                while not has_ended.is_set():
                    self._pause()
        self._raise_errors()

    def wait_for(self, seconds: float) -> bool:
        """Wait for ``seconds`` at most; return whether the exchange is complete."""
        if self._messages:
            has_ended, until = self._watch(), time.monotonic() + seconds
            if self._pause is None:
                has_ended.wait(seconds)
            else:
                while not has_ended.is_set() and time.monotonic() < until:
                    self._pause()
        return self.test()

    def test(self) -> bool:
        if self._messages and not self._watch().is_set():
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
            self._threads.watch(self._messages, self._complete_and_report)
        return self._has_ended

    def _complete_and_report(self) -> None:
        assert self._has_ended is not None
        self._complete()
        self._has_ended.set()

    def _complete(self) -> None:
        try:
            while self._messages:
                with TranslatedErrors(self._messages[-1].peer):
                    self._messages[-1].work.wait()
                self._messages.pop()
        except TransportError as error:
            self._error = error

    def __del__(self) -> None:
        if self._messages and self._has_ended is None and self._error is None:
            self._threads.keep(self._messages)
