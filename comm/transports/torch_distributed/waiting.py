"""Threads that wait for messages in flight, because Gloo reports the end of a message only to a thread that waits."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import SimpleQueue
from typing import NamedTuple, TypeAlias

from lentando.comm.transports.torch_distributed.groups import Work

__all__ = ["MessageInFlight", "Messages", "WaitingThreads"]

END_SECONDS = 1.0
"""Time that the threads have to end, when all messages should have arrived."""


class MessageInFlight(NamedTuple):
    """A message that has been started.

    Attributes:
        work: its operation. Gloo loses a message whose operation is garbage before it is complete.
        peer: rank that receives or sends it.
        is_sent: whether this rank sends it.
        tag: its tag.
        nbytes: its length.
    """

    work: Work
    peer: int
    is_sent: bool
    tag: int
    nbytes: int


Messages: TypeAlias = list[MessageInFlight]
"""Messages of one exchange. Those that are complete are removed, from the end."""


class WaitingThreads:
    """The threads of one transport: one for each exchange that is watched, and one for all that no one waits for."""

    def __init__(self) -> None:
        self._watching: list[threading.Thread] = []
        self._idle = 0
        self._changing = threading.Lock()
        self._watched: dict[int, Messages] = {}
        self._to_watch: SimpleQueue[tuple[Messages, Callable[[], None]] | None] = SimpleQueue()
        self._kept: deque[Messages] = deque()
        self._to_keep: SimpleQueue[bool] = SimpleQueue()
        self._keeper = threading.Thread(target=self._keep, name="lentando-keeping", daemon=True)
        self._keeper.start()

    def watch(self, messages: Messages, wait: Callable[[], None]) -> None:
        """Let a thread of its own call a function, which waits for the messages and raises nothing."""
        with self._changing:
            self._watched[id(messages)] = messages
            if self._idle:
                self._idle -= 1
            else:
                self._watching.append(threading.Thread(target=self._watch, name="lentando-waiting", daemon=True))
                self._watching[-1].start()
        self._to_watch.put((messages, wait))

    def keep(self, messages: Messages) -> None:
        """Keep messages until they are complete. May be called at any moment, by a destructor.

        An error is not reported: the next operation with that rank, whose connection is closed, raises it again.
        """
        self._kept.append(messages)
        self._to_keep.put(True)

    def end(self) -> None:
        """Let the threads end when there is nothing left to wait for, and wait for them for some time."""
        self._to_keep.put(False)
        for _ in self._watching:
            self._to_watch.put(None)
        self.join(END_SECONDS)

    def join(self, seconds: float) -> None:
        """Wait for the threads, after ``end``."""
        until = time.monotonic() + seconds
        for thread in (self._keeper, *self._watching):
            thread.join(max(0.0, until - time.monotonic()))

    def in_flight(self) -> Messages:
        """Messages that are not complete yet."""
        with self._changing:
            return [message for messages in (*self._watched.values(), *self._kept) for message in tuple(messages)]

    def _watch(self) -> None:
        while (item := self._to_watch.get()) is not None:
            messages, wait = item
            wait()
            with self._changing:
                del self._watched[id(messages)]
                self._idle += 1
            del item, messages, wait  # which may hold the last reference to arrays

    def _keep(self) -> None:
        while self._to_keep.get():
            messages = self._kept[0]
            with suppress(RuntimeError):
                while messages:
                    messages[-1].work.wait()
                    messages.pop()
            self._kept.popleft()
            del messages
