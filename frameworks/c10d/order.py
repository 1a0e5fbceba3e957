"""The order in which a rank executes the collective operations of one group: that of their submission."""

import threading
import time
from collections.abc import Callable
from queue import SimpleQueue
from typing import TypeAlias

from torch.distributed import DistBackendError

from lentando.c10d.work import CollectiveWork

__all__ = ["Order"]

_Item: TypeAlias = tuple[CollectiveWork, Callable[[], None]]


class Order:
    """Executes operations one at a time: on a thread, or on the caller's if it waits for the result at once.

    Args:
        name: name of the thread, for debuggers and profilers.

    Attributes:
        progressed: ``time.monotonic()`` at the end of the last operation.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self.progressed = time.monotonic()
        self._is_closed = False
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._executing = threading.Lock()
        self._submitting = threading.Lock()
        self._queued = 0
        self._thread: threading.Thread | None = None

    def submit(self, work: CollectiveWork, operation: Callable[[], None], *, at_once: bool) -> None:
        """Execute an operation after those that were submitted before. After ``close``, the work fails at once.

        Args:
            work: what the operation completes.
            operation: function that communicates.
            at_once: whether the caller waits for the result: then its own thread executes the operation if nothing else
                is in progress.
        """
        with self._submitting:
            is_closed = self._is_closed
            is_own = not is_closed and at_once and self._queued == 0 and self._executing.acquire(blocking=False)
            if not is_closed and not is_own:
                self._queued += 1
                self._queue.put((work, operation))
                if self._thread is None:
                    self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                    self._thread.start()
        if is_closed:
            work.run(_refusing(work.description))
        if is_own:
            try:
                work.run(operation)
            finally:
                self.progressed = time.monotonic()
                self._executing.release()

    def close(self, seconds: float) -> bool:
        """End the thread after everything that was submitted, and take nothing more.

        Args:
            seconds: the longest time to wait for that.

        Returns:
            whether it has ended.
        """
        with self._submitting:
            self._is_closed = True
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
                self.progressed = time.monotonic()
            with self._submitting:
                self._queued -= 1
            del item, work, operation  # which may hold the last reference to tensors of the user


def _refusing(description: str) -> Callable[[], None]:
    def refuse() -> None:
        raise DistBackendError(f"{description} is not possible any more: this rank has left the group")

    return refuse
