"""What a call with ``async_op=True`` returns: PyTorch's ``Work``, completed by this rank's thread."""

import threading
import time
from collections.abc import Callable, Sequence
from datetime import timedelta

import torch
from torch._C._distributed_c10d import Work
from torch.distributed import DistBackendError
from torch.futures import Future

from lentando.c10d.futures import ResultFuture

__all__ = ["CollectiveWork"]

NO_LIMIT = timedelta(0)
"""What PyTorch passes to ``wait`` for no other limit than that of the operation itself."""


LOOK_SECONDS = 1.0
"""Interval at which a thread that waits compares the time with the timeout of the operation."""
LATE_SECONDS = 2.0
"""An operation ends itself at its timeout, by an error that says more; this is the time it has for that."""


class CollectiveWork(Work):
    """One call of a collective operation.

    Args:
        description: the call in words, for messages.
        outputs: the tensors that it fills, which the future returns.
        timeout_seconds: the longest time that it takes, once those before it are over.
        progressed: returns ``time.monotonic()`` at the end of the last operation before it.
    """

    def __init__(
        self,
        description: str,
        outputs: Sequence[torch.Tensor],
        timeout_seconds: float,
        progressed: Callable[[], float],
    ) -> None:
        super().__init__()
        self.description = description
        self._outputs = list(outputs)
        self._timeout_seconds = timeout_seconds
        self._progressed = progressed
        self._submitted = time.monotonic()
        self._is_over = threading.Event()
        self._lock = threading.Lock()
        self._error: Exception | None = None
        self._future: ResultFuture | None = None

    def run(self, operation: Callable[[], None]) -> None:
        """Execute the operation, and complete this work by its result or its exception."""
        try:
            operation()
        except Exception as error:  # noqa: BLE001 - raised again in the thread that waits
            self._error = error
        with self._lock:
            self._is_over.set()
            future = self._future
        if future is not None:
            # Functions that are attached to the future may wait for other operations, and this thread would then wait
            # for itself.
            future.complete_on_thread()

    def wait(self, timeout: timedelta = NO_LIMIT) -> bool:
        """Wait until the operation is complete.

        Args:
            timeout: the longest time to wait; the operation's own timeout always applies.

        Raises:
            DistBackendError: if it has failed, or is not complete in time.
        """
        seconds = timeout.total_seconds() if timeout > NO_LIMIT else float("inf")
        until = time.monotonic() + seconds
        while not self._is_over.wait(max(0.0, min(LOOK_SECONDS, until - time.monotonic()))):
            now = time.monotonic()
            if now >= until:
                raise DistBackendError(f"{self.description} is not complete after {seconds:g} s of waiting")
            begun = max(self._submitted, self._progressed())
            if now > begun + self._timeout_seconds + LATE_SECONDS:
                raise DistBackendError(
                    f"{self.description} has not ended within its timeout of {self._timeout_seconds:g} s, nor has an "
                    "operation before it"
                )
        if self._error is not None:
            raise self._error
        return True

    def synchronize(self) -> None:
        """Wait until the operation is complete, as ``wait`` does."""
        self.wait()

    def is_completed(self) -> bool:
        """Whether the operation is over, with or without success."""
        return self._is_over.is_set()

    def is_success(self) -> bool:
        """Whether the operation is over, and has not failed."""
        return self._is_over.is_set() and self._error is None

    def exception(self) -> Exception | None:
        """The error of an operation that has failed."""
        return self._error

    def result(self) -> list[torch.Tensor]:
        """The tensors that the operation fills, once it is complete."""
        self.wait()
        return self._outputs

    def get_future(self) -> Future[list[torch.Tensor]]:
        """A future of the tensors that the operation fills."""
        with self._lock:
            if self._future is not None:
                return self._future.future
            made = self._future = ResultFuture(self.result)
            is_over = self._is_over.is_set()
        if is_over:
            made.complete()
        return made.future
