"""A second transport of the same MPI ranks, for one thread that communicates while the main thread computes."""

import time
from collections.abc import Callable, Sequence

from lentando.comm.errors import TransportError
from lentando.comm.transport import Message, Request
from lentando.comm.transports.mpi.transport import MPITransport

__all__ = ["BackgroundMPITransport"]


class BackgroundMPITransport(MPITransport):
    """Ranks of another communicator, whose messages never meet those of the first.

    MPI's own waiting spins, and would take a core from the computation. This one asks every now and then.
    """

    closed = False
    yields_cpu = True

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        return _Patient(self._pause, super().exchange(sends, receives, tag, overlap=overlap))

    def _pause(self) -> None:
        if self.closed:
            raise TransportError("the transport was closed while a thread of its was communicating")
        super()._pause()

    def close(self) -> None:
        self.closed = True
        super().close()


class _Patient:
    """An exchange that is waited for without spinning."""

    def __init__(self, pause: Callable[[], None], request: Request) -> None:
        self._pause = pause
        self._request = request

    def wait(self) -> None:
        while not self._request.test():
            self._pause()

    def wait_for(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        while not self._request.test():
            if time.monotonic() >= until:
                return False
            self._pause()
        return True

    def test(self) -> bool:
        return self._request.test()
