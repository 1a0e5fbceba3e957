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

    def close(self) -> None:
        """There is nothing left to close."""

    def _refuse(self) -> NoReturn:
        raise NotImplementedError
