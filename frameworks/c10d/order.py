"""The order in which a rank executes the collective operations of one group: that of their submission."""

import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import TypeAlias

from torch.distributed import DistBackendError

from lentando.c10d.work import CollectiveWork
from lentando.comm.errors import LentandoError

__all__ = ["Order"]

PROGRESS_SECONDS = 2e-3
"""Interval at which messages that an operation has left behind are given the opportunity to continue. Each time, the
interpreter lock is taken from the main thread, which gets it back once this thread has got a processor."""
LONGEST_PROGRESS_SECONDS = 1.0
"""They are given it for as long as the operation itself has taken, but not longer than this."""

_Item: TypeAlias = tuple[Callable[[], None], Callable[[], None]]
"""What executes an operation, and what sends ahead for it."""


class Order:
    """Executes operations one at a time: on a thread, or on the caller's if it waits for the result at once.

    Args:
        name: name of the thread, for debuggers and profilers.
        progress: lets messages continue that MPI has taken from an operation, and sends only inside its calls: other
            ranks wait for them although the operation has ended here. None if there are none.

    Attributes:
        progressed: ``time.monotonic()`` at the end of the last operation.
    """

    def __init__(self, name: str, progress: Callable[[], object] | None = None) -> None:
        self._name = name
        self._progress = progress
        self._progress_until = 0.0
        self._unexpected: Exception | None = None
        self.progressed = time.monotonic()
        self._is_closed = False
        self._queue: SimpleQueue[_Item | None] = SimpleQueue()
        self._next: deque[_Item | None] = deque()
        self._executing = threading.Lock()
        self._submitting = threading.Lock()
        self._queued = 0
        self._thread: threading.Thread | None = None

    def submit(
        self,
        work: CollectiveWork,
        operation: Callable[[], None],
        *,
        at_once: bool,
        send_ahead: Callable[[], None] | None = None,
    ) -> None:
        """Execute an operation after those that were submitted before. After ``close``, the work fails at once.

        Args:
            work: what the operation completes.
            operation: function that communicates.
            at_once: whether the caller waits for the result: then its own thread executes the operation if nothing else
                is in progress.
            send_ahead: sends what it can for the operation, while the one before it waits for its last messages. It is
                not always called.
        """

        def execute_queued() -> None:
            with self._executing:
                self._execute(work, operation)
            with self._submitting:
                self._queued -= 1

        with self._submitting:
            is_closed = self._is_closed
            is_own = not is_closed and at_once and self._queued == 0 and self._executing.acquire(blocking=False)
            if not is_closed and not is_own:
                self._queued += 1
                self._put((execute_queued, send_ahead or _nothing))
        if is_closed:
            left = DistBackendError(f"{work.description} is not possible any more: this rank has left the group")
            work.run(_raising(left))
        if is_own:
            try:
                self._execute(work, operation)
            finally:
                self._executing.release()
            with self._submitting:
                if self._progress is not None and not self._is_closed:
                    self._put((_nothing, _nothing))  # wakes the thread

    def send_ahead(self) -> None:
        """Let the next operation, if there is one, send what it can: the present one only waits for messages."""
        if threading.current_thread() is not self._thread or self._next:
            return
        with suppress(Empty):
            self._next.append(self._queue.get_nowait())
        if self._next and self._next[0] is not None:
            _, send_ahead = self._next[0]
            send_ahead()

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

    def _put(self, item: _Item) -> None:
        self._queue.put(item)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
            self._thread.start()

    def _execute(self, work: CollectiveWork, operation: Callable[[], None]) -> None:
        started = time.monotonic()
        try:
            work.run(operation if self._unexpected is None else _raising(self._unexpected))
        finally:
            self.progressed = time.monotonic()
            self._progress_until = self.progressed + min(self.progressed - started, LONGEST_PROGRESS_SECONDS)

    def _run(self) -> None:
        while (item := self._next.popleft() if self._next else self._get()) is not None:
            execute, _ = item
            execute()
            del item, execute  # which may hold the last reference to tensors of the user

    def _get(self) -> _Item | None:
        """The next item. Until it comes, messages that the last operation has left behind continue for some time."""
        while self._progress is not None and time.monotonic() < self._progress_until:
            with suppress(Empty):
                return self._queue.get(timeout=PROGRESS_SECONDS)
            if self._executing.acquire(blocking=False):  # otherwise an operation on the caller's thread does it
                try:
                    self._progress()
                except LentandoError:  # the thread has to live: the next operation raises it in the thread that waits
                    self._progress_until = 0.0
                except Exception as error:  # noqa: BLE001 - raised by all following operations
                    self._progress_until, self._unexpected = 0.0, error
                finally:
                    self._executing.release()
        return self._queue.get()


def _nothing() -> None:
    pass


def _raising(error: Exception) -> Callable[[], None]:
    def fail() -> None:
        raise error

    return fail
