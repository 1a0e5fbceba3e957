"""The transport of a world of one rank, in which collectives have nothing to do."""

import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, Message, ReduceOp, Request, Traffic
from lentando.comm.transports.mailbox import Mailbox, Receive

__all__ = ["SingleTransport"]


class SingleTransport:
    """The transport of a program that was started alone."""

    name = "single"
    rank = 0
    size = 1
    local_rank = 0
    local_size = 1

    def __init__(self) -> None:
        self.traffic = Traffic()
        self._mailboxes: defaultdict[int, Mailbox] = defaultdict(Mailbox)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        """Exchange messages with this rank itself, which are kept until they are received."""
        for peer, _ in (*sends, *receives):
            if peer != 0:
                raise TransportError(f"exchange with rank {peer}, but this is a world of 1: only rank 0 exists")
        posted = [Receive(array) for _, array in receives]
        for receive in posted:
            self._mailboxes[tag].post(receive)
        for _, array in sends:
            self._mailboxes[tag].send(array)
            self.traffic.messages += 1
            self.traffic.bytes_sent += array.nbytes
        return _SingleExchange(posted)

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        self.traffic.collectives += 1

    def broadcast(self, array: Array, root: int = 0) -> None:
        if root != 0:
            raise TransportError(f"broadcast from rank {root}, but this is a world of 1: only rank 0 exists")
        self.traffic.collectives += 1

    def allgather(self, array: Array) -> Array:
        self.traffic.collectives += 1
        return array[np.newaxis].copy()

    def barrier(self) -> None:
        self.traffic.collectives += 1

    def for_ranks(self, ranks: Sequence[int]) -> "SingleTransport":
        return SingleTransport()

    def clock(self) -> float:
        return time.perf_counter()

    def abort(self, status: int = 1) -> NoReturn:
        sys.exit(status)

    def close(self) -> None:
        return


class _SingleExchange:
    """Receives of messages of this rank to itself, complete as soon as these are sent."""

    def __init__(self, receives: list[Receive]) -> None:
        self._receives = receives

    def test(self) -> bool:
        return all(receive.is_filled for receive in self._receives)

    def wait(self) -> None:
        missing = sum(not receive.is_filled for receive in self._receives)
        if missing:
            raise TransportError(
                f"waiting for {missing} message(s) from rank 0 in a world of 1 that have not been sent: "
                "this would never return"
            )

    def wait_for(self, seconds: float) -> bool:
        """Part of ``TimedRequest``, which NCCL's transport promises over any other transport."""
        self.wait()
        return True
