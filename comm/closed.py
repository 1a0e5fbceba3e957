"""Transports of a job that has ended: optimizers may still hold them, but their engine no longer knows their ranks."""

from typing import NoReturn

from lentando.comm.errors import NotInitializedError
from lentando.comm.refusing import Refusing, become
from lentando.comm.transport import Transport

__all__ = ["ended", "is_closed", "mark_closed"]


def mark_closed(transport: Transport) -> None:
    """Let every method of this transport that communicates raise an error: the engine below has ended, or will now."""
    become(transport, _Closed)


def is_closed(transport: Transport) -> bool:
    """Whether the transport cannot communicate any more."""
    return isinstance(transport, _Closed)


def ended(rank: int) -> NotInitializedError:
    """The error of what communicates on a rank whose job has ended."""
    return NotInitializedError(
        f"rank {rank} communicates after its job has ended, by shutdown() or because the program has called "
        "MPI.Finalize(). Optimizers that were wrapped before cannot be used any more: call init() and wrap again, "
        "or end the job after training"
    )


class _Closed(Refusing):
    def abort(self, status: int = 1) -> NoReturn:
        """End this process: the other ranks wait for it no more."""
        raise SystemExit(status)

    def send_nowait(self, peer: int, content: bytes) -> None:
        """Nobody asks any more who is missing."""

    def receive_nowait(self) -> None:
        """Nobody asks any more who is missing."""

    def _refuse(self) -> NoReturn:
        raise ended(self.rank)
