"""A second transport of the same MPI ranks, for one thread that communicates while the main thread computes."""

import time
from collections.abc import Sequence

from mpi4py import MPI

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, Message, ReduceOp, Request
from lentando.comm.transports.mpi.exchange import POLL_SECONDS
from lentando.comm.transports.mpi.transport import OPS, MPITransport

__all__ = ["BackgroundMPITransport"]


class BackgroundMPITransport(MPITransport):
    """Ranks of another communicator, whose messages never meet those of the first. Implements ``Patient``.

    MPI's own waiting spins, and would take a core from the computation. This one asks every now and then.
    """

    closed = False

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        return _Patient(self, super().exchange(sends, receives, tag, overlap=overlap))

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        with self._translated:
            request = self._comm.Iallreduce(MPI.IN_PLACE, array, OPS[op])
            while not request.Test():
                self.pause()
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def node_barrier(self) -> None:
        with self._translated:
            request = self._node.Ibarrier()
            while not request.Test():
                self.pause()
        self.traffic.count_collective(0)

    def pause(self) -> None:
        """Between two questions."""
        if self.closed:
            raise TransportError("the transport was closed while a thread of its was communicating")
        time.sleep(POLL_SECONDS)

    def close(self) -> None:
        self.closed = True
        super().close()


class _Patient:
    """An exchange that is waited for without spinning."""

    def __init__(self, transport: BackgroundMPITransport, request: Request) -> None:
        self._transport = transport
        self._request = request

    def wait(self) -> None:
        while not self._request.test():
            self._transport.pause()

    def test(self) -> bool:
        return self._request.test()
