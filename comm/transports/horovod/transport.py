"""The transport: collectives by Horovod's engine, messages in rounds."""

import os
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import numpy as np

from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import TransportError
from lentando.comm.extremes import from_ordered, needs_order, to_ordered
from lentando.comm.forked import refuse_in_children
from lentando.comm.pieces import longest_elements, pieces
from lentando.comm.transport import Array, Message, ReduceOp, Request, Traffic, as_bytes, check_rank
from lentando.comm.transports.horovod.engine import REDUCED_HERE, Engine, finish, load_engine
from lentando.comm.transports.horovod.point_to_point import PointToPoint

__all__ = ["HorovodTransport"]

COLLECTIVE = "lentando.collective"
"""One name for all of ours: ranks that bring different shapes then get an error, and do not wait for ever."""
NOTICE_TAG = 32_768
"""Keeps notices apart from all messages of ``exchange``, whose tags end below."""

_WIDER = {"bool": "int32", "int8": "int32", "int16": "int32", "uint8": "int32", "uint16": "int32", "uint32": "int64"}


class HorovodTransport:
    """Ranks of Horovod's job, beside the program's own use of Horovod.

    Horovod stays as it is when the transport is closed.

    Args:
        engine: Horovod, initialised; by default, through the binding that fits the program.
    """

    name = "horovod"

    def __init__(self, engine: Engine | None = None) -> None:
        self._engine = engine = load_engine() if engine is None else engine
        self.rank, self.size = engine.rank(), engine.size()
        self.local_rank, self.local_size = engine.local_rank(), engine.local_size()
        self.binding = engine.binding
        self.traffic = Traffic()
        self._point_to_point = PointToPoint(engine)
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
        flat = array.reshape(-1)
        in_order = needs_order(flat, op)
        reduced = to_ordered(flat, op) if in_order else flat.astype(_reduced_as(array.dtype, op), copy=False)
        for piece in _pieces(reduced):
            finish(self._engine.allreduce(COLLECTIVE, piece, op))
        if in_order:
            from_ordered(reduced, flat)
        elif reduced is not flat:
            with np.errstate(over="ignore", invalid="ignore"):  # as an engine would
                flat[...] = reduced.astype(array.dtype)
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def broadcast(self, array: Array, root: int = 0) -> None:
        check_rank(root, self.size, "broadcast from")
        memory = _writable(array) if self.rank == root else array
        for piece in _pieces(as_bytes(memory)):
            finish(self._engine.broadcast(COLLECTIVE, piece, root))
        self.traffic.count_collective(array.nbytes if self.rank == root and self.size > 1 else 0)

    def allgather(self, array: Array) -> Array:
        gathered = np.empty((self.size, *array.shape), array.dtype)
        by_rank = as_bytes(gathered).reshape(self.size, -1)
        start = 0
        for piece in _pieces(as_bytes(_writable(array)), longest_elements(1, self.size)):
            found = finish(self._engine.allgather(COLLECTIVE, piece))
            by_rank[:, start : start + piece.size] = found.reshape(self.size, -1)
            start += piece.size
        self.traffic.count_collective(array.nbytes * (self.size - 1))
        return gathered

    def barrier(self) -> None:
        finish(self._engine.allreduce(COLLECTIVE, np.zeros(1, np.int32), "sum"))
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
        """The receive of the next notice of another rank, started at the first call."""
        if peer not in self._expected_notices:
            notice = np.zeros(1, np.int64)
            self._expected_notices[peer] = notice, self._point_to_point.exchange([], [(peer, notice)], NOTICE_TAG)
        return self._expected_notices[peer]

    def clock(self) -> float:
        return time.perf_counter()

    def abort(self, status: int = 1) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)  # the launcher ends the others when a rank ends so

    def close(self) -> None:
        self._point_to_point.close()


def _writable(array: Array) -> Array:
    """An array that is only read, as the bindings want it: torch warns of memory that it could not write."""
    return array if array.flags.writeable else array.copy()


def _pieces(array: Array, longest: int | None = None) -> Iterator[Array]:
    """The parts of a one-dimensional array that one collective takes; none if it has no elements."""
    if not array.flags.writeable:
        raise TransportError("a collective that writes to a read-only array: give it a copy")
    return pieces(array, longest) if array.size else iter(())


def _reduced_as(dtype: np.dtype[Any], op: ReduceOp) -> np.dtype[Any]:
    """The dtype in which Horovod reduces arrays of ``dtype``: its own, or a wider one whose result fits."""
    if dtype == bfloat16 or dtype == np.float16:
        return np.dtype(np.float32)
    if dtype.name in REDUCED_HERE:
        return dtype
    if dtype == np.uint64 and op == "sum":
        return np.dtype(np.int64)  # equal to the bit, carries and all
    if dtype.name in _WIDER:
        return np.dtype(_WIDER[dtype.name])
    raise TransportError(f"Horovod has no all-reduce ({op}) for {dtype}: expected floating point or integers")
