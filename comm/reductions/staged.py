"""Sums of arrays in ordinary memory, through staging memory that all ranks of a node can access.

``NodeReduction`` reads and writes the arrays themselves, which must therefore lie in shared memory. Any other array is
copied into the staging memory and back, in pieces that stay in the cache meanwhile: of its own memory each element is
read once and written once. While a rank copies one piece in, it forms its part of the sum of the piece before, and
copies out the one before that, so that a piece costs a single barrier.
"""

from collections.abc import Callable, Sequence
from typing import Any, cast

import numpy as np

from lentando.comm.array_module import is_on_host
from lentando.comm.capabilities import SharedNode, shares_memory
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.elastic import is_elastic
from lentando.comm.flat import blocks
from lentando.comm.job import job_of
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.node import add_up, note_first_non_finite, open_node_memory
from lentando.comm.reductions.reduction import quiet, store
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport

__all__ = ["StagedSums", "staged_sums"]

PIECE_BYTES = 1024 * 1024
"""A piece of each rank: the longer it is, the fewer barriers; the shorter, the more of it stays in the cache."""
LONG_PIECE_BYTES = 8 * 1024 * 1024
"""A piece of gradients: each barrier is a wait for the slowest rank, and data loaders may take its core for a while."""
PIECES = 3
"""Pieces that are in the staging memory at once."""
STAGED_FROM_BYTES = 256 * 1024
"""Smaller arrays are left to the backend: two barriers cost about as much as its latency."""


class StagedSums:
    """Sums over the ranks of one transport, in the order of the ranks, ((x_0 + x_1) + x_2) + ..., or of a ring.

    Args:
        rank: number of this rank.
        buffers: staging memory of each rank, by rank, in bytes: room for ``PIECES`` pieces.
    """

    def __init__(self, rank: int, buffers: Sequence[Array]) -> None:
        self._rank, self._size = rank, len(buffers)
        length = self._piece_bytes = buffers[0].size // PIECES
        self._slots = [[buffer[slot * length : (slot + 1) * length] for buffer in buffers] for slot in range(PIECES)]
        self._first = 0
        self._scratch: Array = np.empty(length, np.uint8)

    def all_reduce(
        self,
        transport: Transport,
        array: Array,
        *,
        mean: bool = False,
        first_barrier: Callable[[], object] | None = None,
    ) -> None:
        """Replace an array by its sum, or mean, over ranks, bit-identical on every rank.

        Args:
            transport: the transport, a ``SharedNode``. It is not kept: these sums are a part of its job.
            array: one-dimensional contiguous array in host memory, of real floating-point numbers or integers.
            mean: whether the sum is divided by the number of ranks.
            first_barrier: what waits for all ranks once the first piece is staged, if they exchange something else in
                it; by default the barrier of the node. The array is changed after it.
        """
        longest = self._piece_bytes // array.dtype.itemsize
        pieces = [
            self._piece([array[start : start + longest]], number)
            for number, start in enumerate(range(0, array.size, longest))
        ]
        barrier = cast(SharedNode, transport).node_barrier
        self._pass_through(transport, pieces, mean, first_barrier or barrier, barrier)

    def all_reduce_and_search(self, transport: Transport, arrays: Sequence[Array], *, mean: bool) -> Array:
        """Replace arrays by their sums, or means, over ranks, and find the ranks whose values were not finite.

        Each rank searches its part of the sum while it is in the cache, and the terms only where the sum is not finite.
        Sums are formed in the order of ``RingReduction`` of one buffer that contains all arrays.

        Args:
            transport: the transport, a ``SharedNode``. It is not kept.
            arrays: one-dimensional contiguous arrays of one dtype, of floating-point numbers, which do not overlap.
                Ranks may cut the same number of elements into other arrays.
            mean: whether the sum is divided by the number of ranks.

        Returns:
            By rank the number of its first element that was not finite, the number of all elements if all were finite;
            equal on all ranks.
        """
        elements = sum(array.size for array in arrays)
        firsts = np.full(self._size, elements, np.int64)
        longest, pieces = self._piece_bytes // arrays[0].dtype.itemsize, list[_Piece]()
        for leader in range(self._size):
            chunk = ring_schedule.chunk(leader, self._size, elements)
            for start in range(chunk.start, chunk.stop, longest):
                parts = _cut(arrays, start, min(start + longest, chunk.stop))
                pieces.append(self._piece(parts, len(pieces), leader, start, firsts))
        barrier = cast(SharedNode, transport).node_barrier
        self._pass_through(transport, pieces, mean, barrier, lambda: transport.allreduce(firsts, "min"))
        return firsts

    def _piece(
        self, parts: Sequence[Array], number: int, leader: int = 0, start: int = 0, firsts: Array | None = None
    ) -> "_Piece":
        staging = self._slots[(self._first + number) % PIECES]
        return _Piece(self._rank, parts, staging, leader, start, firsts)

    def _pass_through(
        self,
        transport: Transport,
        pieces: "Sequence[_Piece]",
        mean: bool,
        first_barrier: Callable[[], object],
        last_barrier: Callable[[], object],
    ) -> None:
        """Let pieces pass through the staging memory, and count what is sent."""
        # The memory of a piece is used again for the third piece after it, also if that belongs to the next array: all
        # ranks have passed a barrier since they have copied it out.
        self._first = (self._first + len(pieces)) % PIECES
        divisor = self._size if mean else 1
        barrier = cast(SharedNode, transport).node_barrier
        with quiet():
            for stage in range(len(pieces) + PIECES - 1):
                if stage:
                    (first_barrier if stage == 1 else last_barrier if stage == len(pieces) + 1 else barrier)()
                if stage >= 2:
                    pieces[stage - 2].copy_out()
                if 1 <= stage <= len(pieces):
                    piece = pieces[stage - 1]
                    piece.add_up(divisor, self._scratch_for(piece.dtype))
                if stage < len(pieces):
                    pieces[stage].copy_in()
        nbytes = sum(piece.nbytes for piece in pieces)
        transport.traffic.count_collective(2 * nbytes * (self._size - 1) // self._size)

    def _scratch_for(self, dtype: np.dtype[Any]) -> Array | None:
        """Memory for sums that are formed in another dtype than that of the array."""
        wide = accumulator_dtype(dtype)
        if wide == dtype:
            return None
        return self._scratch.view(wide)


class _Piece:
    """A piece of what is summed, and the staging memory that it passes through.

    Args:
        rank: number of this rank.
        parts: the piece, as one or several arrays; read and replaced by their sums.
        staging: staging memory of each rank, by rank.
        leader: the rank with whose values each sum begins.
        start: number of the first element, of all that are summed.
        firsts: numbers, by rank, of the first element that is not finite, to be lowered; None if the sum is not
            searched.
    """

    def __init__(
        self,
        rank: int,
        parts: Sequence[Array],
        staging: Sequence[Array],
        leader: int,
        start: int,
        firsts: Array | None,
    ) -> None:
        size, self.dtype = len(staging), parts[0].dtype
        elements = sum(part.size for part in parts)
        self.nbytes = elements * self.dtype.itemsize
        self._rank, self._firsts = rank, firsts
        self._order = [(leader + step) % size for step in range(size)]
        self._shared = [memory[: self.nbytes].view(self.dtype) for memory in staging]
        self._in: list[tuple[slice, Array]] = []
        self._mine: list[tuple[slice, Array]] = []
        self._out: list[tuple[int, slice, Array]] = []
        for number in range(size):
            chunk = ring_schedule.chunk(number, size, elements)
            at = chunk.start
            for part in _cut(parts, chunk.start, chunk.stop):
                where = slice(at, at + part.size)
                at += part.size
                if number == rank:
                    self._mine.append((where, part))
                else:
                    self._in.append((where, part))
                    self._out.append((number, where, part))
        self._start = start

    def copy_in(self) -> None:
        """Copy what other ranks sum."""
        staged = self._shared[self._rank]
        for where, values in self._in:
            np.copyto(staged[where], values)

    def add_up(self, divisor: int, scratch: Array | None) -> None:
        """Sum this rank's part over the ranks, and store the result in the staging memory and in the array."""
        for where, values in self._mine:
            for block in blocks(values):
                at = slice(where.start + block.start, min(where.start + block.stop, where.stop))
                shared, own = [memory[at] for memory in self._shared], values[block]
                terms = [own if rank == self._rank else shared[rank] for rank in self._order]
                staged = shared[self._rank]
                total = staged if scratch is None else scratch[: staged.size]
                add_up(terms, total)
                if self._firsts is not None and not np.isfinite(total).all():
                    note_first_non_finite(self._firsts, self._order, terms, self._start + at.start)
                store(total, staged, divisor)
                np.copyto(own, staged)

    def copy_out(self) -> None:
        """Copy what other ranks have summed."""
        for number, where, values in self._out:
            np.copyto(values, self._shared[number][where])


def _cut(arrays: Sequence[Array], start: int, stop: int) -> list[Array]:
    """Elements ``start`` to ``stop`` of arrays that follow each other."""
    found, begin = [], 0
    for array in arrays:
        end = begin + array.size
        if end > start and begin < stop:
            found.append(array[max(0, start - begin) : stop - begin])
        begin = end
    return found


class _Opened:
    """The sums of a transport, by the length of their pieces; None if some rank cannot access the memory of another."""

    def __init__(self) -> None:
        self.sums: dict[int, StagedSums | None] = {}


def staged_sums(transport: Transport, array: Array, piece_bytes: int = PIECE_BYTES) -> StagedSums | None:
    """The sums over a transport by which arrays in ordinary memory are reduced. Collective at the first call.

    Args:
        transport: transport that connects the ranks.
        array: array to be summed, equal on all ranks in size and dtype.
        piece_bytes: length of a piece in bytes.

    Returns:
        None, on all ranks alike, if ranks are on several nodes or cannot access each other's memory, if a rank may die,
        and for an array on a device, or one for which the backend is faster.
    """
    if not shares_memory(transport) or transport.local_size < transport.size:
        return None
    if not is_on_host(array) or array.nbytes < STAGED_FROM_BYTES or is_elastic(transport):
        return None
    opened = job_of(transport).get(_Opened).sums
    if piece_bytes not in opened:
        memory = open_node_memory(transport, shared_zeros(PIECES * piece_bytes, np.dtype(np.uint8)))
        opened[piece_bytes] = None if memory is None else StagedSums(transport.rank, memory.buffers)
    return opened[piece_bytes]
