"""Futures of tensors that are completed by a thread, and whose errors reach PyTorch's C++ code as well."""

import threading
from collections.abc import Callable

import torch
from torch.futures import Future

__all__ = ["ResultFuture"]


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
        """Complete the future on a thread of its own: attached functions may wait for other operations."""
        threading.Thread(target=self.complete, name="lentando-future").start()
