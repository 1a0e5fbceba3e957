"""Handles of asynchronous operations, and what is submitted."""

import logging
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

from lentando.comm.summation import Summation
from lentando.comm.transport import Transport

__all__ = ["Call", "Executor", "Handle", "ZeroCall", "tensor_name"]

_log = logging.getLogger("lentando")

R = TypeVar("R")
R_co = TypeVar("R_co", covariant=True)


class Call(Protocol[R_co]):
    """A collective operation with its arguments, ready to be executed."""

    @property
    def operation(self) -> str:
        """Name of the operation, such as ``allreduce``."""

    @property
    def arguments(self) -> list[Any]:
        """What must be equal on all ranks, as JSON."""

    @property
    def description(self) -> str:
        """Operation and arguments as JSON, in one text."""

    @property
    def name(self) -> str | None:
        """Name by which calls of different ranks are matched; None to match them by their number."""

    @property
    def summation(self) -> Summation | None:
        """The arrays, if the operation is a sum or mean that may be formed together with others."""

    def execute(self, transport: Transport) -> R_co:
        """Move the data. If this raises a ``LentandoError`` other than a ``TransportError``, it does so on all ranks.

        Args:
            transport: transport that connects the ranks, for this call alone.
        """


ZeroCall = Callable[[str, list[Any]], Call[Any]]
"""Makes the call by which a rank that has joined contributes zeros, from operation and arguments."""


def tensor_name(call: Call[Any]) -> str:
    """The operation and its name, as timelines show them and names are negotiated: ``allreduce.gradient``."""
    return f"{call.operation}.{call.name}" if call.name else call.operation


class Executor(Protocol):
    """What executes the operations of handles."""

    def wait_for(self, handle: "Handle[Any]") -> None:
        """Wait until the operation of a handle is complete."""

    def poll_for(self, handle: "Handle[Any]") -> None:
        """Called before each ``poll`` of a handle that is not complete yet."""

    def note_seen(self) -> None:
        """Called when the program notices that an operation is complete."""


class Handle(Generic[R]):
    """An operation that was submitted. Any thread may wait for it, as often as it likes.

    The operation is executed whether or not its handle is kept. An error that is never raised is logged.

    A program may submit hundreds of operations in each step, and every object that lives until they are complete brings
    Python's next garbage collection nearer: a handle makes no others.

    Args:
        key: name by which the ranks match the operation.
        executor: executes the operation.
        call: the operation; None for ``join``, which is none.

    Attributes:
        key: name by which the ranks match the operation.
        is_seen: whether the program has noticed that the operation is complete.
    """

    def __init__(self, key: str, executor: Executor, call: Call[R] | None = None) -> None:
        self.key = key
        self.is_seen = False
        self._call = call
        self._executor = executor
        self._result: R
        self._error: Exception | None = None
        self._is_complete = self._is_raised = False

    @property
    def call(self) -> Call[R]:
        """The operation, as long as it is not complete: it is released then."""
        assert self._call is not None, f"{self.key} is complete"
        return self._call

    def __del__(self) -> None:
        if self._error is not None and not self._is_raised:
            _log.error(
                "asynchronous operation %r has failed, and the program has not waited for it: %s", self.key, self._error
            )

    def poll(self) -> bool:
        """Whether the operation is complete, so that ``wait`` returns at once. Its error is raised by ``wait`` alone.

        Over a backend that admits one thread only, the second call waits for the operation. All ranks must then wait
        for asynchronous operations, as for ``wait``.

        Raises:
            MismatchError: on every rank, over such a backend, if some rank does something else.
        """
        if not self._is_complete:
            self._executor.poll_for(self)
        if self._is_complete:
            self._note_seen()
        return self._is_complete

    @property
    def is_complete(self) -> bool:
        """The same, without letting the operation make progress; the program does not notice it."""
        return self._is_complete

    def wait(self) -> R:
        """Wait until the operation is complete, and return its result.

        Raises:
            MismatchError: on every rank, if ranks submit different operations under one name, or wait for operations
                that other ranks will never submit.
            TransportError: on every rank, if the operation has failed on one of them, or if a rank has died.
        """
        if not self._is_complete:
            self._executor.wait_for(self)
        self._note_seen()
        if self._error is not None:
            self._is_raised = True
            raise self._error
        return self._result

    def _note_seen(self) -> None:
        self.is_seen = True
        self._executor.note_seen()

    def succeed(self, result: R) -> None:
        """Record the result. Called by the thread that has executed the operation."""
        self._call = None
        self._result, self._is_complete = result, True

    def fail(self, error: Exception) -> None:
        """Record the error that ``wait`` raises."""
        self._call = None
        self._error, self._is_complete = error, True
