"""Transports that must no longer communicate: their methods raise an error that gives the reason."""

from typing import Any, NoReturn

from lentando.comm.transport import Transport

__all__ = ["Refusing", "become"]


def become(transport: Transport, kind: type["Refusing"]) -> None:
    """From now on, let every communicating method of this transport raise the error of ``kind``. Sends nothing."""
    original = type(transport)
    if not issubclass(original, kind):
        transport.__class__ = type(original.__name__, (kind, original), {})


class Refusing:
    """Base class that precedes a transport's original class, and overrides the methods that communicate."""

    rank: int

    def exchange(self, *_: Any, **__: Any) -> NoReturn:
        """Raise the error that gives the reason, as all communicating methods do."""
        self._refuse()

    allreduce = broadcast = allgather = barrier = node_barrier = exchange
    for_ranks = for_thread = open_side_channel = leave_notice = read_notice = take_notice = vote = repair = exchange
    next_message = exchange

    def close(self) -> None:
        """Release nothing: there is nothing left to release."""

    def _refuse(self) -> NoReturn:
        raise NotImplementedError
