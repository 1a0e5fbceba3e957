"""Processes that a rank makes by fork (workers of a pool, of a data loader): they have its memory, and are no ranks.

Such a process knows ``rank()`` and ``size()`` of the rank that made it. It cannot communicate: what it would send would
come in between the messages of that rank, or end the job. So the transports that it has inherited refuse to.
"""

import os
from typing import Any, NoReturn
from weakref import WeakSet

from lentando.comm.errors import TransportError
from lentando.comm.transport import Transport

__all__ = ["is_forked", "refuse_in_children"]

_transports: WeakSet[Transport] = WeakSet()


def refuse_in_children(transport: Transport) -> None:
    """In processes that are forked from now on, let every method of this transport that communicates raise an error."""
    _transports.add(transport)


def is_forked(transport: Transport) -> bool:
    """Whether this process has inherited the transport from the rank that made it by fork."""
    return isinstance(transport, _InChild)


def _after_fork_in_child() -> None:
    for transport in list(_transports):
        kind = type(transport)
        if transport.size > 1 and not issubclass(kind, _InChild):
            transport.__class__ = type(kind.__name__, (_InChild, kind), {})


os.register_at_fork(after_in_child=_after_fork_in_child)


class _InChild:
    """Comes before a transport's own class: everything else stays as it is."""

    rank: int

    def exchange(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    def allreduce(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    def broadcast(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    def allgather(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    def barrier(self) -> NoReturn:
        self._refuse()

    def node_barrier(self) -> NoReturn:
        self._refuse()

    def for_thread(self) -> NoReturn:
        self._refuse()

    def open_side_channel(self) -> NoReturn:
        self._refuse()

    def leave_notice(self, *_: Any) -> NoReturn:
        self._refuse()

    def read_notice(self, *_: Any) -> NoReturn:
        self._refuse()

    def take_notice(self, *_: Any) -> NoReturn:
        self._refuse()

    def vote(self, *_: Any, **__: Any) -> NoReturn:
        self._refuse()

    def repair(self) -> NoReturn:
        self._refuse()

    def abort(self, status: int = 1) -> NoReturn:
        """End this process, and not the job."""
        os._exit(status)

    def close(self) -> None:
        """The transport belongs to the rank."""

    def _refuse(self) -> NoReturn:
        raise TransportError(
            f"process {os.getpid()} was made by fork (multiprocessing, os.fork) from rank {self.rank}, and only the "
            "rank itself can communicate: call collectives, step(), averaged(), save and load there, and give the "
            "child process what it needs as plain arrays and numbers"
        )
