"""The end of MPI by the program's own call of ``MPI.Finalize()``, of which open transports must be notified."""

from typing import Protocol
from weakref import WeakSet

from mpi4py import MPI

__all__ = ["end_at_finalize", "forget"]


class _EndsWithMPI(Protocol):
    def end_with_mpi(self) -> None:
        """Make no more calls of MPI."""


_open: WeakSet[_EndsWithMPI] = WeakSet()
_keys: list[int] = []


def end_at_finalize(transport: _EndsWithMPI) -> None:
    """Call ``transport.end_with_mpi()`` before MPI ends, if the program calls ``MPI.Finalize()`` itself.

    MPI deletes the attributes of ``COMM_SELF``, and calls their delete functions, before it ends. At the end of the
    interpreter, where mpi4py ends MPI, Python functions are no longer called, and need not be.
    """
    _open.add(transport)
    if not _keys:
        _keys.append(MPI.Comm.Create_keyval(delete_fn=_on_finalize))
        MPI.COMM_SELF.Set_attr(_keys[0], True)


def forget(transport: _EndsWithMPI) -> None:
    """Undo ``end_at_finalize`` for a transport that is closed."""
    _open.discard(transport)


def _on_finalize(*_: object) -> None:
    for transport in list(_open):
        transport.end_with_mpi()
