"""All-reduce where the ranks of a node access each other's memory, and only the sums of a node cross the links.

Each rank of a node sums one part of the buffer over the node, directly from its neighbours' memory, and writes the
result back to all of them, block by block: the memory that it writes to is still in the cache. No other rank touches
that part, so the ranks wait for each other only at the start and at the end. Between nodes, a ring connects the ranks
that own the same part: a link carries 2(N - 1)/N of the buffer for N nodes, however many ranks a node has.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from lentando.comm.capabilities import SharedNode
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.flat import blocks
from lentando.comm.objects import allgather_object
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.reduction import Each, quiet, store
from lentando.comm.reductions.ring import DEFAULT_SEGMENTS, RingReduction, Segments
from lentando.comm.shared_memory import export_handle, import_handle
from lentando.comm.transport import Array, Message, Request, Transport

__all__ = ["NodeMemory", "NodeReduction", "add_up", "note_first_non_finite", "open_node_memory"]

Tag = TypeVar("Tag")


@dataclass(frozen=True)
class NodeMemory:
    """The buffers of all ranks of this node, and how ranks are distributed over nodes.

    Attributes:
        nodes: the ranks of each node, equally many, by local rank.
        buffers: the buffers of this node's ranks, by local rank, including this rank's own.
        barrier: waits for all ranks of this node.
    """

    nodes: Sequence[Sequence[int]]
    buffers: Sequence[Array]
    barrier: Callable[[], None]


def open_node_memory(transport: Transport, buffer: Array) -> NodeMemory | None:
    """Open the buffers of the other ranks of this node. Collective if the transport is a ``SharedNode``.

    Returns:
        None, on all ranks alike, if a rank cannot access the buffer of another rank of its node, or the nodes have
        different numbers of ranks, or one each.
    """
    if not isinstance(transport, SharedNode):
        return None
    same_node = transport.same_node
    by_rank = allgather_object(transport, [list(same_node), export_handle(buffer)])
    nodes = sorted({tuple(node) for node, _ in by_rank})
    if len({len(node) for node in nodes}) > 1 or len(nodes[0]) < 2:
        return None
    buffers = []
    for rank in same_node:
        handle = by_rank[rank][1]
        if rank == transport.rank and handle is not None:
            buffers.append(buffer)
        elif handle is not None and (opened := import_handle(handle, buffer.size, buffer.dtype)) is not None:
            buffers.append(opened)
    has_all = np.array([len(buffers) == len(same_node)])
    if not transport.allgather(has_all).all():
        return None
    return NodeMemory(nodes, buffers, transport.node_barrier)


class NodeReduction:
    """All-reduce of one buffer through shared memory within nodes, and by rings between them.

    On a single node, sums are formed in the order of ``RingReduction``, and are bit-identical to those.

    Args:
        transport: transport that connects the participating ranks.
        buffer: one-dimensional, contiguous array in shared memory; read and written in place at every execution.
        memory: the same buffer on all ranks of this node.
        segments: how the ring between nodes cuts its messages.
        in_rank_order: whether every part is summed in the order of the node's ranks instead.
    """

    def __init__(
        self,
        transport: Transport,
        buffer: Array,
        memory: NodeMemory,
        segments: Segments = DEFAULT_SEGMENTS,
        *,
        in_rank_order: bool = False,
    ) -> None:
        self._transport, self._traffic = transport, transport.traffic
        self._buffer_size = buffer.size
        node = next(node for node in memory.nodes if transport.rank in node)
        local_rank, count = node.index(transport.rank), len(node)
        self._size = transport.size
        self._barrier = memory.barrier
        part = ring_schedule.shard(local_rank, count, buffer.size)
        # In the ring's order: a part is summed starting with the next rank, and ending with this one.
        first = 0 if in_rank_order else local_rank + 1
        order = [(first + step) % count for step in range(count)]
        self._values = [memory.buffers[number][part] for number in order]
        self._ranks = [node[number] for number in order]
        self._part = buffer[part]
        self._neighbors = [values[part] for number, values in enumerate(memory.buffers) if number != local_rank]
        self._crossing_bytes = 2 * (count - 1) * self._part.nbytes  # read from neighbours' memory, and written there
        self._sum: Array = np.empty(self._part.size, accumulator_dtype(buffer.dtype))
        self._between: RingReduction | None = None
        self.shard = part
        if len(memory.nodes) > 1:
            counterparts = _Counterparts(transport, [ranks[local_rank] for ranks in memory.nodes])
            self._between = RingReduction(counterparts, self._part, segments, self._sum)
            within = self._between.shard
            self.shard = slice(part.start + within.start, part.start + within.stop)

    def reduce_scatter(self, each: Each | None = None) -> Array:
        if self._between is None:
            self._sum_node(each)
            return self._sum
        self._sum_node()
        return self._between.reduce_scatter(each)

    def all_gather(self) -> None:
        if self._between is not None:
            self._between.all_gather()
        self._barrier()  # no rank needs the previous values any more
        self._distribute()

    def all_reduce(self, mean: bool) -> None:
        divisor = self._size if mean else 1
        if self._between is None:
            self._barrier()  # all ranks have written their values
            self._reduce_in_place(divisor)
            self._end()
        else:
            self._sum_node()
            self._between.reduce_and_divide(divisor)
            self._distribute()

    @property
    def is_within_node(self) -> bool:
        """Whether all ranks are on this node, so that the methods that follow may be called."""
        return self._between is None

    def visit_sum(self, each: Each) -> None:
        """Form the sum of this rank's shard like ``reduce_scatter``, and keep nothing of it.

        To read all terms again takes no longer than to write the sum to memory and to read it back.

        Args:
            each: function that is called once with every block of the sum, while it is in the cache.
        """
        self._barrier()  # all ranks have written their values
        with quiet():
            for block in blocks(self._part):
                each(self._total(block))

    def replace(self, cut: Iterable[tuple[slice, Tag]], change: Callable[[slice, Tag, Array], object]) -> None:
        """Form the sum of this rank's shard again, change the shard, and give every rank the result, block by block.

        The sum was found to be finite before, so that there are no warnings of NumPy to suppress.

        Args:
            cut: blocks of the shard, counted from its start, each with something that ``change`` needs to know.
            change: writes the new values of a block to the shard of this rank's buffer. It is called with the block,
                what came with it, and the sum of its elements, which may be overwritten.
        """
        self._barrier()  # no rank needs the previous values of this rank's part any more
        for block, tag in cut:
            change(block, tag, self._total(block))
            for target in self._neighbors:
                np.copyto(target[block], self._part[block])
        self._end()

    def _total(self, block: slice) -> Array:
        """The sum of some elements of this rank's part over the node, in scratch memory of the length of a block."""
        terms = [values[block] for values in self._values]
        total = self._sum[: terms[0].size]
        add_up(terms, total)
        return total

    def all_reduce_and_search(self, mean: bool) -> Array:
        """Replace the buffer by its sum, or mean, over ranks, and find the ranks whose values were not finite.

        Each rank searches its part of the sum while it is in the cache, and the terms only where the sum is not finite.
        The result is exchanged in place of the last barrier. There is no first one: the caller has exchanged a message
        with all ranks since it wrote the buffer, and so have they.

        Args:
            mean: whether the sum is divided by the number of ranks.

        Returns:
            By rank the index of its first element that was not finite, the size of the buffer if all were finite; equal
            on all ranks.
        """
        firsts = np.full(self._size, self._buffer_size, np.int64)
        self._reduce_in_place(self._size if mean else 1, firsts)
        self._transport.allreduce(firsts, "min")  # no rank writes here any more
        self._count()
        return firsts

    def _sum_node(self, each: Each | None = None) -> None:
        """Sum this rank's part over the node, into scratch memory, in blocks that stay in the cache meanwhile."""
        self._barrier()  # all ranks have written their values
        with quiet():
            for block in blocks(self._part):
                total = self._sum[block]
                add_up([values[block] for values in self._values], total)
                if each is not None:
                    each(total)

    def _reduce_in_place(self, divisor: int, firsts: Array | None = None) -> None:
        """Replace this rank's part by its sum, on every rank of the node.

        Args:
            divisor: what the sum is divided by.
            firsts: indices, by rank, of the first element of the buffer that is not finite, to be lowered; None if the
                sum is not searched.
        """
        # A sum in scratch memory, which stays in the cache, leaves the terms as they are until it has been searched.
        is_apart = firsts is not None or self._sum.dtype != self._part.dtype
        with quiet():
            for block in blocks(self._part):
                values = [part[block] for part in self._values]
                total = self._sum[: values[0].size] if is_apart else values[0]
                add_up(values, total)
                if firsts is not None and not np.isfinite(total).all():
                    note_first_non_finite(firsts, self._ranks, values, self.shard.start + block.start)
                store(total, values[0], divisor)
                for target in values[1:]:
                    np.copyto(target, values[0])

    def _distribute(self) -> None:
        """Write this rank's part into the memory of its neighbours."""
        for block in blocks(self._part):
            for target in self._neighbors:
                np.copyto(target[block], self._part[block])
        self._end()

    def _end(self) -> None:
        self._barrier()  # no rank writes here any more: the caller may read and write
        self._count()

    def _count(self) -> None:
        self._traffic.count_collective(self._crossing_bytes)


def add_up(terms: Sequence[Array], total: Array) -> None:
    """Sum the terms in order. ``total`` may be the first of them."""
    first, *others = terms
    if others and first.dtype == total.dtype:
        np.add(first, others.pop(0), out=total)  # one pass less than copying the first
    else:
        np.copyto(total, first)
    for term in others:
        np.add(total, term, out=total)


def note_first_non_finite(firsts: Array, ranks: Sequence[int], terms: Sequence[Array], start: int) -> None:
    """Lower the numbers of each rank's first element that is not finite.

    Args:
        firsts: these numbers by rank.
        ranks: ranks that the terms belong to.
        terms: values of these ranks.
        start: number of the first of the values.
    """
    for rank, values in zip(ranks, terms, strict=True):
        is_bad = ~np.isfinite(values)
        if is_bad.any():
            firsts[rank] = min(int(firsts[rank]), start + int(is_bad.argmax()))


class _Counterparts:
    """Some of a transport's ranks, with numbers of their own: the ``Exchanges`` of a ring among them."""

    def __init__(self, transport: Transport, ranks: Sequence[int]) -> None:
        self._transport = transport
        self._ranks = ranks
        self.rank, self.size = ranks.index(transport.rank), len(ranks)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        return self._transport.exchange(
            [(self._ranks[peer], array) for peer, array in sends],
            [(self._ranks[peer], array) for peer, array in receives],
            tag,
            overlap=overlap,
        )
