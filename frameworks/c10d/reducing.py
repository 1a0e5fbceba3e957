"""All-reduces of ordinary tensors, by the algorithm that suits their size and the places of the ranks."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from lentando.c10d.arithmetic import reduce_array
from lentando.c10d.comparison import Comparison
from lentando.comm.capabilities import shares_memory
from lentando.comm.collectives import plan_reduction
from lentando.comm.dtypes import accumulator_dtype, is_floating
from lentando.comm.operations.combining import as_numbers
from lentando.comm.reductions.direct import IN_ONE_ROUND_BYTES, DirectSums
from lentando.comm.reductions.reduction import Reduction
from lentando.comm.reductions.staged import STAGED_FROM_BYTES, staged_sums
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport

__all__ = ["Reducing"]

PLANNED_FROM_BYTES = 256 * 1024
"""Shorter arrays take longer to plan than to reduce."""
PLANS = 64
"""Number of lengths whose plans are kept. Models have a few dozens of buckets."""
DIRECT_PART_BYTES = 1024 * 1024
"""Ranks behind links of their own send to each other directly if the part of each is not longer: a longer one keeps the
links busy on a ring, which does not let several ranks send to the same one."""
DIRECT_RANKS = 16
"""With more ranks, too many would send to the same one at the same time."""


@dataclass
class _Planned:
    """A reduction of the first elements of the memory."""

    memory: Array
    reduction: Reduction


class Reducing:
    """The all-reduces of one group on this rank.

    Ranks send small arrays to each other directly. Within a node, sums of large ones pass through shared staging
    memory. Ranks that have a node each also exchange medium arrays directly, and sum large ones on a pipelined ring.
    If there are several nodes of several ranks, large arrays are copied into memory of this object, whose reduction is
    planned once: within each node through shared memory, between nodes by a ring. MPI carries everything else.

    Args:
        transport: transport of the group, for the thread that executes operations.
        comparison: the comparison of the present call, which is ended before an array is changed. Where ranks wait for
            each other anyway, it takes the place of that.
        send_next_ahead: called when a call has nothing more to send: lets the next one send what it can.
    """

    def __init__(self, transport: Transport, comparison: Comparison, send_next_ahead: Callable[[], None]) -> None:
        self._comparison = comparison
        self._send_next_ahead = send_next_ahead
        self._transport = transport
        self._is_one_node = transport.local_size == transport.size
        self._is_alone = False
        self._is_open = False
        self._direct = DirectSums(transport)
        self._direct_up_to = 0
        self._memory: Array = np.empty(0, np.uint8)
        self._planned: dict[tuple[int, str], _Planned] = {}

    def all_reduce(self, arrays: Sequence[Array], ops: Sequence[str]) -> None:
        """Combine arrays over all ranks, in place, and end the comparison of the call. Collective.

        Args:
            arrays: one-dimensional, contiguous arrays.
            ops: a name that ``arithmetic.name_of`` has returned for its dtype, for each.
        """
        if not self._is_open:  # what the ranks share is opened by all of them together
            self._comparison.end()
            self._open()
        filled = [(as_numbers(array), op) for array, op in zip(arrays, ops, strict=True) if array.size]
        for number, (array, op) in enumerate(filled, 1):
            self._reduce(array, op, self._send_next_ahead if number == len(filled) else None)
        if not filled:
            self._comparison.end()

    def send_ahead(self, array: Array, op: str) -> None:
        """Send what ``all_reduce`` would send first. Nothing is waited for."""
        if self._is_open and array.size and self._is_direct(as_numbers(array), op):
            self._comparison.send()
            self._direct.send_ahead(as_numbers(array))

    def _open(self) -> None:
        """Find out how the ranks are distributed over nodes, and open staging memory. Collective."""
        transport = self._transport
        self._is_alone = bool((transport.allgather(np.array([transport.local_size])) == 1).all())
        self._direct_up_to = IN_ONE_ROUND_BYTES // transport.size
        if self._is_one_node:
            self._direct_up_to = STAGED_FROM_BYTES - 1
        elif self._is_alone and transport.size <= DIRECT_RANKS:
            self._direct_up_to = DIRECT_PART_BYTES * transport.size
        staged_sums(transport, np.empty(STAGED_FROM_BYTES, np.uint8))
        self._is_open = True

    def _is_direct(self, array: Array, op: str) -> bool:
        is_short = array.nbytes <= self._direct_up_to
        return _is_sum(array, op) and is_short and accumulator_dtype(array.dtype) == array.dtype

    def _reduce(self, array: Array, op: str, all_is_sent: Callable[[], None] | None) -> None:
        is_sum, is_mean, compare = _is_sum(array, op), op == "AVG", self._comparison.end
        first_barrier = compare if self._comparison.is_pending else None
        if self._is_direct(array, op):
            self._comparison.send()
            self._direct.all_reduce(array, mean=is_mean, first_barrier=first_barrier, all_is_sent=all_is_sent)
            return
        staged = staged_sums(self._transport, array) if is_sum else None
        if staged is not None:
            staged.all_reduce(self._transport, array, mean=is_mean, first_barrier=first_barrier)
            return
        if self._is_one_node or not is_sum or array.nbytes < PLANNED_FROM_BYTES:
            compare()
            reduce_array(self._transport, array, op)
            return
        if self._is_alone:
            compare()
            plan_reduction(self._transport, array, "ring").all_reduce(is_mean)
            return
        planned = self._plan(array)
        self._comparison.send()
        np.copyto(planned.memory, array)
        compare()
        planned.reduction.all_reduce(is_mean)
        np.copyto(array, planned.memory)

    def _plan(self, array: Array) -> _Planned:
        if array.nbytes > self._memory.nbytes:
            self._planned.clear()
            new = shared_zeros if shares_memory(self._transport) else np.zeros
            self._memory = new(array.nbytes, np.dtype(np.uint8))
        key = array.size, array.dtype.name
        if key not in self._planned:
            self._comparison.end()  # all ranks plan together
            if len(self._planned) >= PLANS:
                del self._planned[next(iter(self._planned))]
            memory = self._memory[: array.nbytes].view(array.dtype)
            self._planned[key] = _Planned(memory, plan_reduction(self._transport, memory))
        return self._planned[key]


def _is_sum(array: Array, op: str) -> bool:
    return op == "SUM" or (op == "AVG" and is_floating(array.dtype))
