"""A world of one: nothing crosses a wire, every collective is already done."""

import sys
import time
from collections import defaultdict, deque
from collections.abc import Sequence
from typing import NoReturn

import numpy as np

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, Message, ReduceOp, Traffic, as_bytes

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
        self._sent: defaultdict[int, deque[Array]] = defaultdict(deque)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> "_Delivery":
        """Messages to oneself are the only ones there can be; they are held until a receive asks for them."""
        for peer, array in (*sends, *receives):
            if peer != 0:
                raise TransportError(f"exchange with rank {peer}, but this is a world of 1: only rank 0 exists")
        for _, array in sends:
            self._sent[tag].append(array.copy())
            self.traffic.messages += 1
            self.traffic.bytes_sent += array.nbytes
        return _Delivery(self._sent[tag], [array for _, array in receives])

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

    def clock(self) -> float:
        return time.perf_counter()

    def abort(self, status: int = 1) -> NoReturn:
        sys.exit(status)

    def close(self) -> None:
        return


class _Delivery:
    """Receives of messages to oneself: complete as soon as enough of them were sent."""

    def __init__(self, sent: deque[Array], receives: list[Array]) -> None:
        self._sent = sent
        self._receives = receives

    def test(self) -> bool:
        if len(self._sent) < len(self._receives):
            return False
        for array in self._receives:
            as_bytes(array)[...] = as_bytes(self._sent.popleft())
        self._receives = []
        return True

    def wait(self) -> None:
        if not self.test():
            raise TransportError(
                f"waiting for {len(self._receives)} message(s) from rank 0 in a world of 1, but only "
                f"{len(self._sent)} were sent: this would never return"
            )
