"""Futures of tensors that are completed by a thread, and whose errors reach PyTorch's C++ code as well."""

from collections.abc import Callable

import torch
from torch.futures import Future

from lentando.c10d.kept_threads import KeptThreads

__all__ = ["ResultFuture", "wait_for_futures"]

_threads = KeptThreads("lentando-future")


class ResultFuture:
    """A future of the result of an operation.

    ``Future.set_exception`` is not used: it is seen by Python only, and DDP would take the exception for a gradient.

    Args:
        result: returns the tensors, or raises the error of the operation, after waiting for it if need be.

    Attributes:
        future: the future, for PyTorch.
    """

    def __init__(self, result: Callable[[], list[torch.Tensor]]) -> None:
        self._over: Future[None] = Future()
        self.future: Future[list[torch.Tensor]] = self._over.then(lambda _: result())

    def complete(self) -> None:
        """Complete the future, on this thread, with all functions that are attached to it."""
        self._over.set_result(None)

    def complete_on_thread(self) -> None:
        """Complete the future on a thread that does nothing else: attached functions may wait for other operations."""
        _threads.call(self.complete)


def wait_for_futures(seconds: float) -> None:
    """Wait until futures are complete that other threads are completing, but not longer than ``seconds``."""
    _threads.wait(seconds)
