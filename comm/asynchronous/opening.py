"""Opens and closes the asynchronous operations of a job, or of one of its process sets."""

from typing import Protocol, TypeVar

from lentando.comm.asynchronous.handle import Call, Handle, ZeroCall
from lentando.comm.asynchronous.in_turn import OperationsInTurn
from lentando.comm.asynchronous.negotiated import NegotiatedOperations
from lentando.comm.capabilities import Background, SideChannel, YieldsCPU
from lentando.comm.job import job_of
from lentando.comm.stall import inspect_submissions
from lentando.comm.transport import Transport

__all__ = ["Operations", "close_operations", "find_operations", "open_operations", "operations_of"]

R = TypeVar("R")


class Operations(Protocol):
    """The asynchronous operations of one rank: those in a thread, or those in turn."""

    def submit(self, call: Call[R]) -> Handle[R]:
        """Submit an operation. Returns at once."""

    def join(self, zeros: ZeroCall) -> Handle[int]:
        """Contribute zeros to sums until all ranks have called this method. The result is the last rank to call it."""

    def cancel_join(self) -> None:
        """No longer contribute zeros, because all ranks have got an error."""

    def names_in_flight(self) -> list[str]:
        """Names of the operations that this rank has submitted and that are not complete."""

    def may_continue_without(self, thread: int) -> bool:
        """Whether this rank may submit operations while a thread, of this identifier, waits in a blocking call."""

    def inspect(self, blocked_in: tuple[str, float] | None) -> None:
        """Called about once a second, with the blocking call in which this rank waits, and when that began."""

    def close(self) -> None:
        """Let the operations in flight raise an error. Collective."""


class _Opened:
    """The asynchronous operations of one transport."""

    operations: Operations


def open_operations(transport: Transport) -> None:
    """Prepare asynchronous operations: all ranks call this together, once, before any of them submits. Collective.

    Nothing is polled, and no thread started, before the first submission.

    Args:
        transport: transport of the job, or of a process set.
    """
    if transport.size == 1 or not isinstance(transport, Background):
        return
    # Only a program that uses the thread needs a main thread that yields the processor while it waits.
    yielded = isinstance(transport, YieldsCPU) and transport.yields_cpu
    data = transport.for_thread()
    if isinstance(transport, YieldsCPU):
        transport.yields_cpu = yielded
    if data is not None and isinstance(data, SideChannel) and data.open_side_channel():
        operations = NegotiatedOperations(transport, data)
        job_of(transport).get(_Opened).operations = operations
        inspect_submissions(transport, operations)


def operations_of(transport: Transport) -> Operations:
    """The asynchronous operations of this rank."""
    opened = job_of(transport).get(_Opened)
    if not hasattr(opened, "operations"):
        opened.operations = OperationsInTurn(transport)
    return opened.operations


def find_operations(transport: Transport) -> Operations | None:
    """The asynchronous operations of this rank, if there are any yet."""
    opened = job_of(transport).find(_Opened)
    return None if opened is None else opened.operations


def close_operations(transport: Transport) -> None:
    """Let the operations in flight raise an error, and end the thread. Collective, at the end of the job."""
    opened = job_of(transport).drop(_Opened)
    if opened is not None:
        opened.operations.close()
