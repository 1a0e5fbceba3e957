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
from lentando.comm.job import job_of
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.node import add_up, open_node_memory
from lentando.comm.reductions.reduction import quiet, store
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport

__all__ = ["StagedSums", "staged_sums"]

PIECE_BYTES = 1024 * 1024
"""A piece of each rank: the longer it is, the fewer barriers; the shorter, the more of it stays in the cache."""
PIECES = 3
"""Pieces that are in the staging memory at once."""
STAGED_FROM_BYTES = 256 * 1024
"""Smaller arrays are left to the backend: two barriers cost about as much as its latency."""


class StagedSums:
    """Sums over the ranks of one transport, in the order of the ranks: ((x_0 + x_1) + x_2) + ...

    Args:
        rank: number of this rank.
        buffers: staging memory of ``PIECES * PIECE_BYTES`` bytes of each rank, by rank.
    """

    def __init__(self, rank: int, buffers: Sequence[Array]) -> None:
        self._rank, self._size = rank, len(buffers)
        self._slots = [
            [buffer[slot * PIECE_BYTES : (slot + 1) * PIECE_BYTES] for buffer in buffers] for slot in range(PIECES)
        ]
        self._first = 0
        self._scratch: Array = np.empty(PIECE_BYTES, np.uint8)

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
        longest = PIECE_BYTES // array.dtype.itemsize
        pieces = [
            _Piece(self._rank, array[start : start + longest], self._slots[(self._first + number) % PIECES])
            for number, start in enumerate(range(0, array.size, longest))
        ]
        # The memory of a piece is used again for the third piece after it, also if that belongs to the next array: all
        # ranks have passed a barrier since they have copied it out.
        self._first = (self._first + len(pieces)) % PIECES
        divisor = self._size if mean else 1
        scratch = self._scratch_for(array.dtype)
        barrier = cast(SharedNode, transport).node_barrier
        with quiet():
            for stage in range(len(pieces) + PIECES - 1):
                if stage == 1 and first_barrier is not None:
                    first_barrier()
                elif stage:
                    barrier()
                if stage >= 2:
                    pieces[stage - 2].copy_out()
                if 1 <= stage <= len(pieces):
                    pieces[stage - 1].add_up(divisor, scratch)
                if stage < len(pieces):
                    pieces[stage].copy_in()
        transport.traffic.count_collective(2 * array.nbytes * (self._size - 1) // self._size)

    def _scratch_for(self, dtype: np.dtype[Any]) -> Array | None:
        """Memory for sums that are formed in another dtype than that of the array."""
        wide = accumulator_dtype(dtype)
        if wide == dtype:
            return None
        return self._scratch.view(wide)


class _Piece:
    """A piece of an array, and the staging memory that it passes through.

    Args:
        rank: number of this rank.
        values: the piece; read and replaced by its sum.
        staging: staging memory of each rank, by rank.
    """

    def __init__(self, rank: int, values: Array, staging: Sequence[Array]) -> None:
        size = len(staging)
        shared = [memory[: values.nbytes].view(values.dtype) for memory in staging]
        parts = [ring_schedule.chunk(number, size, values.size) for number in range(size)]
        mine = parts[rank]
        self._mine, self._total = values[mine], shared[rank][mine]
        self._terms = [self._mine if number == rank else memory[mine] for number, memory in enumerate(shared)]
        others = [number for number in range(size) if number != rank]
        around = (slice(0, mine.start), slice(mine.stop, values.size))
        self._in = [(shared[rank][part], values[part]) for part in around if part.stop > part.start]
        self._out = [(values[parts[number]], shared[number][parts[number]]) for number in others]

    def copy_in(self) -> None:
        """Copy what other ranks sum."""
        for staged, values in self._in:
            np.copyto(staged, values)

    def add_up(self, divisor: int, scratch: Array | None) -> None:
        """Sum this rank's part over the ranks, and store the result in the staging memory and in the array."""
        total = self._total if scratch is None else scratch[: self._total.size]
        add_up(self._terms, total)
        store(total, self._total, divisor)
        np.copyto(self._mine, self._total)

    def copy_out(self) -> None:
        """Copy what other ranks have summed."""
        for values, staged in self._out:
            np.copyto(values, staged)


class _Opened:
    """The staging memory of a transport; ``sums`` is None if some rank cannot access that of another one."""

    sums: StagedSums | None


def staged_sums(transport: Transport, array: Array) -> StagedSums | None:
    """The sums over a transport by which arrays in ordinary memory are reduced. Collective at the first call.

    Args:
        transport: transport that connects the ranks.
        array: array to be summed, equal on all ranks in size and dtype.

    Returns:
        None, on all ranks alike, if ranks are on several nodes or cannot access each other's memory, if a rank may die,
        and for an array on a device, or one for which the backend is faster.
    """
    if not shares_memory(transport) or transport.local_size < transport.size:
        return None
    if not is_on_host(array) or array.nbytes < STAGED_FROM_BYTES or is_elastic(transport):
        return None
    opened = job_of(transport).get(_Opened)
    if not hasattr(opened, "sums"):
        memory = open_node_memory(transport, shared_zeros(PIECES * PIECE_BYTES, np.dtype(np.uint8)))
        opened.sums = None if memory is None else StagedSums(transport.rank, memory.buffers)
    return opened.sums
