"""Processes that a rank forks (workers of a pool or a data loader): they inherit its memory, but are no ranks.

``rank()`` and ``size()`` return the values of the rank that forked the process. It cannot communicate: its messages
would be mixed with those of that rank, or end the job. Inherited transports therefore raise an error.
"""

import os
from typing import NoReturn
from weakref import WeakSet

from lentando.comm.errors import TransportError
from lentando.comm.refusing import Refusing, become
from lentando.comm.transport import Transport

__all__ = ["is_forked", "refuse_in_children"]

_transports: WeakSet[Transport] = WeakSet()


def refuse_in_children(transport: Transport) -> None:
    """In processes that are forked from now on, let every communicating method of this transport raise an error."""
    _transports.add(transport)


def is_forked(transport: Transport) -> bool:
    """Whether this process has inherited the transport from the rank that forked it."""
    return isinstance(transport, _InChild)


def _after_fork_in_child() -> None:
    for transport in list(_transports):
        if transport.size > 1:
            become(transport, _InChild)


os.register_at_fork(after_in_child=_after_fork_in_child)


class _InChild(Refusing):
    """A transport that a forked process has inherited."""

    def abort(self, status: int = 1) -> NoReturn:
        """End this process only, not the job."""
        os._exit(status)

    def close(self) -> None:
        """Release nothing: the transport belongs to the rank."""

    def _refuse(self) -> NoReturn:
        raise TransportError(
            f"process {os.getpid()} was made by fork (multiprocessing, os.fork) from rank {self.rank}, and only the "
            "rank itself can communicate: call collectives, step(), averaged(), save and load there, and give the "
            "child process what it needs as plain arrays and numbers"
        )
