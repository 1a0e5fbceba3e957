"""Sums over ranks in the order of the ranks: the sum of an element does not depend on where it is in which buffer.

Backends and rings add the values of an element in an order that depends on its position and on the length of the
buffer. Here it is always ((x_0 + x_1) + x_2) + ..., so that arrays may be summed one by one or together in one buffer
with bit-identical results. Three algorithms form this sum: small buffers are gathered and summed by every rank; where
all ranks can access each other's memory, each sums a part for all (``StagedSums``, or ``NodeReduction`` of a buffer
that lies there); otherwise the parts are exchanged (``DirectSums``).
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lentando.comm.capabilities import shares_memory
from lentando.comm.reductions.direct import DirectSums
from lentando.comm.reductions.node import NodeMemory, NodeReduction, open_node_memory
from lentando.comm.reductions.reduction import quiet, store
from lentando.comm.reductions.staged import staged_sums
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport

__all__ = ["RankOrderSums"]

GATHERED_BYTES = 64 * 1024
"""Buffers that are not longer than this on all ranks together are gathered: a single round of messages."""
LEAST_MEMORY_BYTES = 1024 * 1024
"""Shared memory is opened in at least this size, and in at least twice the previous one: opening it is collective."""


class RankOrderSums:
    """Sums over the ranks of one transport.

    Args:
        transport: transport that connects the ranks. All of them make the same calls in the same order.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._direct = DirectSums(transport)
        self._scratch: dict[str, tuple[Array, NodeMemory | None]] = {}

    def sum_packed(self, arrays: Sequence[Array], dtype: np.dtype[Any], *, mean: bool) -> Array:
        """Return the sum or mean over ranks of arrays, one after the other in one buffer.

        Args:
            arrays: one-dimensional arrays, equally long on all ranks.
            dtype: dtype in which sums are formed.
            mean: whether they are divided by the number of ranks.

        Returns:
            the sum, in memory that is valid until the next call.
        """
        elements = sum(array.size for array in arrays)
        nbytes = elements * dtype.itemsize
        if nbytes * self._transport.size <= GATHERED_BYTES:
            values: Array = np.empty(elements, dtype)
            np.concatenate(arrays, out=values)
            return self._divided(self._gather(values), mean)
        buffer, memory = self._open(nbytes, dtype)
        values = buffer[:elements]
        np.concatenate(arrays, out=values)
        if memory is None:
            self._direct.all_reduce(values, mean=mean)
            return values
        parts = [other[:elements] for other in memory.buffers]
        same = NodeMemory(memory.nodes, parts, memory.barrier)
        NodeReduction(self._transport, values, same, in_rank_order=True).all_reduce(mean)
        return values

    def sum_in_place(self, array: Array, *, mean: bool) -> None:
        """Replace a one-dimensional array by its sum or mean over ranks, without packing it."""
        staged = staged_sums(self._transport, array)
        if array.nbytes * self._transport.size <= GATHERED_BYTES:
            np.copyto(array, self._divided(self._gather(array), mean))
        elif staged is not None:
            staged.all_reduce(self._transport, array, mean=mean)
        else:
            self._direct.all_reduce(array, mean=mean)

    def _divided(self, total: Array, mean: bool) -> Array:
        store(total, total, self._transport.size if mean else 1)
        return total

    def _gather(self, values: Array) -> Array:
        by_rank = self._transport.allgather(values)
        total: Array = by_rank[0]
        with quiet():
            for other in by_rank[1:]:
                np.add(total, other, out=total)
        return total

    def _open(self, nbytes: int, dtype: np.dtype[Any]) -> tuple[Array, NodeMemory | None]:
        """A buffer of at least this size, in memory that all ranks can access if possible. Collective."""
        found = self._scratch.get(dtype.name)
        if found is not None and found[0].nbytes >= nbytes:
            return found
        length = max(nbytes, LEAST_MEMORY_BYTES, 0 if found is None else 2 * found[0].nbytes) // dtype.itemsize
        memory, transport = None, self._transport
        if shares_memory(transport) and transport.local_size == transport.size:
            buffer = shared_zeros(length, dtype)
            memory = open_node_memory(transport, buffer)
        if memory is None:
            buffer = np.empty(length, dtype)
        self._scratch[dtype.name] = buffer, memory
        return buffer, memory
