"""The order in which a rank executes the collective operations of one group: that of their submission."""

import threading
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeAlias

from lentando.c10d.work import CollectiveWork

__all__ = ["Order"]

_Item: TypeAlias = tuple[CollectiveWork, Callable[[], None]]


class Order:
    """Executes operations one at a time: on a thread, or on the caller's if it waits for the result at once.

    Args:
        name: name of the thread, for debuggers and profilers.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._executing = threading.Lock()
        self._submitting = threading.Lock()
        self._queued = 0
        self._thread: threading.Thread | None = None

    def submit(self, work: CollectiveWork, operation: Callable[[], None], *, at_once: bool) -> None:
        """Execute an operation after those that were submitted before.

        Args:
            work: what the operation completes.
            operation: function that communicates.
            at_once: whether the caller waits for the result: then its own thread executes the operation if nothing else
                is in progress.
        """
        with self._submitting:
            if at_once and self._queued == 0 and self._executing.acquire(blocking=False):
                is_own = True
            else:
                is_own = False
                self._queued += 1
                self._queue.put((work, operation))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    self._thread.start()
        if is_own:
            try:
                work.run(operation)
            finally:
                self._executing.release()

    def close(self, seconds: float) -> bool:
        """End the thread after everything that was submitted.

        Args:
            seconds: the longest time to wait for that.

        Returns:
            whether it has ended.
        """
        if self._thread is None:
            return True
        self._queue.put(None)
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while (item := self._queue.get()) is not None:
            work, operation = item
            with self._executing:
                work.run(operation)
            with self._submitting:
                self._queued -= 1
            del item, work, operation  # which may hold the last reference to tensors of the user
