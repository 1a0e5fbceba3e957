"""All-reduce of ordinary tensors. Between nodes, reductions are planned once and kept, on memory of their own."""

from dataclasses import dataclass

import numpy as np

from lentando.c10d.arithmetic import reduce_array
from lentando.comm.capabilities import shares_memory
from lentando.comm.collectives import plan_reduction
from lentando.comm.dtypes import is_floating
from lentando.comm.operations.combining import as_numbers
from lentando.comm.reductions.reduction import Reduction
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport

__all__ = ["Reducing"]

PLANNED_FROM_BYTES = 256 * 1024
"""Shorter arrays take longer to plan than to reduce."""
PLANS = 64
"""Number of lengths whose plans are kept. Models have a few dozens of buckets."""


@dataclass
class _Planned:
    """A reduction of the first elements of the memory."""

    memory: Array
    reduction: Reduction


class Reducing:
    """The all-reduces of one group on this rank.

    Within a node, ``lentando.comm.collectives.all_reduce`` carries arrays of any memory. Between nodes, a tensor is
    copied into memory of this object, whose reduction is planned once: within each node through shared memory, between
    nodes by a pipelined ring. The copies cost little compared to the links.

    Args:
        transport: transport of the group, for the thread that executes operations.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._memory: Array = np.empty(0, np.uint8)
        self._planned: dict[tuple[int, str], _Planned] = {}

    def all_reduce(self, array: Array, op: str) -> None:
        """Combine an array over all ranks, in place. Collective.

        Args:
            array: one-dimensional, contiguous array.
            op: a name that ``arithmetic.name_of`` has returned for its dtype.
        """
        array = as_numbers(array)
        is_sum = op == "SUM" or (op == "AVG" and is_floating(array.dtype))
        is_one_node = self._transport.local_size == self._transport.size
        if array.size == 0:
            return
        if is_one_node or not is_sum or array.nbytes < PLANNED_FROM_BYTES:
            reduce_array(self._transport, array, op)
            return
        planned = self._plan(array)
        np.copyto(planned.memory, array)
        planned.reduction.all_reduce(op == "AVG")
        np.copyto(array, planned.memory)

    def _plan(self, array: Array) -> _Planned:
        if array.nbytes > self._memory.nbytes:
            self._planned.clear()
            new = shared_zeros if shares_memory(self._transport) else np.zeros
            self._memory = new(array.nbytes, np.dtype(np.uint8))
        key = array.size, array.dtype.name
        if key not in self._planned:
            if len(self._planned) >= PLANS:
                del self._planned[next(iter(self._planned))]
            memory = self._memory[: array.nbytes].view(array.dtype)
            self._planned[key] = _Planned(memory, plan_reduction(self._transport, memory))
        return self._planned[key]
