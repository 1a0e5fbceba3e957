"""Transports of a job that has ended: optimizers may still hold them, but the backend can no longer use them."""

from typing import NoReturn

from lentando.comm.errors import NotInitializedError
from lentando.comm.refusing import Refusing, become
from lentando.comm.transport import Transport

__all__ = ["ended", "is_closed", "mark_closed"]


def mark_closed(transport: Transport) -> None:
    """From now on, let every communicating method of this transport raise an error, because the backend ends."""
    become(transport, _Closed)


def is_closed(transport: Transport) -> bool:
    """Whether the transport can no longer communicate, because its backend has ended."""
    return isinstance(transport, _Closed)


def ended(rank: int) -> NotInitializedError:
    """The error for communication on a rank whose job has ended."""
    return NotInitializedError(
        f"rank {rank} communicates after its job has ended, by shutdown() or because the program has called "
        "MPI.Finalize(), or after remove_process_set(). Optimizers that were wrapped before cannot be used any more: "
        "call init() and wrap again, "
        "or end the job after training"
    )


class _Closed(Refusing):
    """A transport whose backend has ended."""

    def abort(self, status: int = 1) -> NoReturn:
        """End this process only: the other ranks no longer wait for it."""
        raise SystemExit(status)

    def send_nowait(self, peer: int, content: bytes) -> None:
        """Send nothing: the stall inspector may still call this method while it ends."""

    def receive_nowait(self) -> None:
        """Receive nothing: the stall inspector may still call this method while it ends."""

    def has_sent_all(self) -> bool:
        """True: nothing can be sent any more."""
        return True

    def _refuse(self) -> NoReturn:
        raise ended(self.rank)
