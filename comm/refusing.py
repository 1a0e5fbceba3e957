"""What a transport becomes when it must not communicate any more: its methods raise an error that says why."""

from typing import Any, NoReturn

from lentando.comm.transport import Transport

__all__ = ["Refusing", "become"]


def become(transport: Transport, kind: type["Refusing"]) -> None:
    """From here on, whatever of this transport communicates raises the error of ``kind``. Sends nothing."""
    own = type(transport)
    if not issubclass(own, kind):
        transport.__class__ = type(own.__name__, (kind, own), {})


class Refusing:
    """Comes before a transport's own class: everything else stays as it is."""

    rank: int

    def exchange(self, *_: Any, **__: Any) -> NoReturn:
        """Raise the error that says why, as everything does that communicates."""
        self._refuse()

    allreduce = broadcast = allgather = barrier = node_barrier = exchange
    for_thread = open_side_channel = leave_notice = read_notice = take_notice = vote = repair = exchange

    def close(self) -> None:
        """There is nothing left to close."""

    def _refuse(self) -> NoReturn:
        raise NotImplementedError
