"""The transport over Horovod: its collectives, and point-to-point messages over them."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NoReturn

import numpy as np

from lentando.comm.closed import mark_closed
from lentando.comm.errors import TransportError
from lentando.comm.forked import refuse_in_children
from lentando.comm.pieces import longest_elements, pieces
from lentando.comm.transport import Array, Message, ReduceOp, Request, Traffic, as_bytes, check_rank
from lentando.comm.transports.horovod.binding import REDUCED_HERE, HorovodBinding, finish, load_binding
from lentando.comm.transports.horovod.point_to_point import PointToPoint
from lentando.comm.transports.wider_dtypes import reduce_by

__all__ = ["HorovodTransport"]

COLLECTIVE = "lentando.collective"
"""Name of all collectives. Ranks that submit different shapes then get an error, instead of waiting forever."""
NOTICE_TAG = 32_768
"""Tag of notices, above all tags of ``exchange``."""


class HorovodTransport:
    """The ranks of Horovod's job, which the program may use as well. Closing the transport does not shut Horovod down.

    Args:
        binding: initialised Horovod; by default through the framework that the program has imported.
    """

    name = "horovod"

    def __init__(self, binding: HorovodBinding | None = None) -> None:
        self._binding = binding = load_binding() if binding is None else binding
        self.rank, self.size = binding.rank(), binding.size()
        self.local_rank, self.local_size = binding.local_rank(), binding.local_size()
        self.binding = binding.module
        self.traffic = Traffic()
        self._point_to_point = PointToPoint(binding)
        self._expected_notices: dict[int, tuple[Array, Request]] = {}
        refuse_in_children(self)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        for peer, _ in (*sends, *receives):
            check_rank(peer, self.size, "exchange with")
        request = self._point_to_point.exchange(sends, receives, tag)
        self.traffic.messages += len(sends)
        self.traffic.bytes_sent += sum(array.nbytes for _, array in sends)
        return request

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        def reduce(reduced: Array) -> None:
            for piece in _pieces(reduced):
                finish(self._binding.allreduce(COLLECTIVE, piece, op))

        reduce_by(reduce, array, op, REDUCED_HERE, "Horovod")
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def broadcast(self, array: Array, root: int = 0) -> None:
        check_rank(root, self.size, "broadcast from")
        memory = _writable(array) if self.rank == root else array
        for piece in _pieces(as_bytes(memory)):
            finish(self._binding.broadcast(COLLECTIVE, piece, root))
        self.traffic.count_collective(array.nbytes if self.rank == root and self.size > 1 else 0)

    def allgather(self, array: Array) -> Array:
        gathered = np.empty((self.size, *array.shape), array.dtype)
        by_rank = as_bytes(gathered).reshape(self.size, -1)
        start = 0
        for piece in _pieces(as_bytes(_writable(array)), longest_elements(1, self.size)):
            gathered_piece = finish(self._binding.allgather(COLLECTIVE, piece))
            by_rank[:, start : start + piece.size] = gathered_piece.reshape(self.size, -1)
            start += piece.size
        self.traffic.count_collective(array.nbytes * (self.size - 1))
        return gathered

    def barrier(self) -> None:
        finish(self._binding.allreduce(COLLECTIVE, np.zeros(1, np.int32), "sum"))
        self.traffic.count_collective(0)

    def leave_notice(self, peer: int, number: int) -> None:
        self._point_to_point.exchange([(peer, np.array([number], np.int64))], [], NOTICE_TAG)

    def read_notice(self, peer: int) -> int | None:
        notice, request = self._expected_notice(peer)
        if not request.test():
            return None
        del self._expected_notices[peer]
        return int(notice[0])

    def take_notice(self, peer: int) -> int:
        notice, request = self._expected_notice(peer)
        request.wait()
        del self._expected_notices[peer]
        return int(notice[0])

    def _expected_notice(self, peer: int) -> tuple[Array, Request]:
        """Return array and request of the next notice of another rank. The first call posts the receive."""
        if peer not in self._expected_notices:
            notice = np.zeros(1, np.int64)
            self._expected_notices[peer] = notice, self._point_to_point.exchange([], [(peer, notice)], NOTICE_TAG)
        return self._expected_notices[peer]

    def clock(self) -> float:
        return time.perf_counter()

    def abort(self, status: int = 1) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the launcher then ends the other ranks

    def close(self) -> None:
        self._point_to_point.close()
        mark_closed(self)  # no thread would send the messages of an exchange


def _writable(array: Array) -> Array:
    """Return the array, or a copy if it is read-only, for which torch would warn."""
    return array if array.flags.writeable else array.copy()


def _pieces(array: Array, longest: int | None = None) -> Iterator[Array]:
    """Yield the parts of a one-dimensional array that fit one collective; none if it has no elements."""
    if not array.flags.writeable:
        raise TransportError("a collective that writes to a read-only array: give it a copy")
    return pieces(array, longest) if array.size else iter(())
