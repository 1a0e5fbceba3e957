"""Lets messages progress while the program computes: MPI moves data only inside its calls."""

import threading
import time
from queue import Empty, SimpleQueue
from typing import Protocol

__all__ = ["Progress"]

POLL_SECONDS = 1e-3
"""Interval between two polls: short enough for a link to stay busy, long enough to leave the processor to others."""


class _Message(Protocol):
    def is_completed(self) -> bool:
        """Let MPI make progress; return whether the message is complete, or has failed."""


class Progress:
    """A thread that polls the messages of a group until they are complete. It starts with the first one."""

    def __init__(self) -> None:
        self._added: SimpleQueue[_Message | None] = SimpleQueue()
        self._thread: threading.Thread | None = None
        self._is_closed = False

    def add(self, message: _Message) -> None:
        """Poll a message that has been started."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="lentando-messages", daemon=True)
            self._thread.start()
        self._added.put(message)

    def close(self) -> None:
        """End the thread, also if messages are not complete: no rank may ever answer them."""
        self._is_closed = True
        self._added.put(None)
        if self._thread is not None:
            self._thread.join()

    def _run(self) -> None:
        pending: list[_Message] = []
        while not self._is_closed:
            try:
                added = self._added.get(block=not pending)
                if added is not None:
                    pending.append(added)
                continue
            except Empty:
                pending = [message for message in pending if not message.is_completed()]
            time.sleep(POLL_SECONDS)
