"""All-reduce where ranks of a node reach each other's memory, and only sums of a node cross the links.

Each rank of a node sums one part of the buffer over the node, straight from its neighbours' memory, and writes what
comes of it back to all of them, block by block: what it writes to is still in the cache. Nobody else touches that part,
so that ranks wait for each other at the start and at the end alone. Between nodes the part goes round the ring of the
ranks that have the same one: a link carries 2(N - 1)/N of the buffer for N nodes, however many ranks a node has.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.flat import blocks
from lentando.comm.objects import allgather_object
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.reduction import Each, quiet, store
from lentando.comm.reductions.ring import SEGMENT_BYTES, SEGMENTS_IN_FLIGHT, RingReduction
from lentando.comm.shared_memory import export_handle, import_handle
from lentando.comm.transport import Array, Message, Request, SharedNode, Transport

__all__ = ["NodeReduction", "plan_node_reduction"]


class NodeReduction:
    """One buffer, reduced within nodes by shared memory and between them by rings.

    Within one node sums are formed in the order of ``RingReduction``, and so equal its to the bit.

    Args:
        transport: ranks that take part.
        nodes: the ranks of each node, equally many, by local rank.
        buffer: one-dimensional and contiguous; lies in shared memory.
        neighbors: the buffers of all ranks of this node, by local rank; this rank's own is ``buffer``.
        barrier: waits for all ranks of this node.
        segment_bytes, in_flight: of the ring between nodes.
    """

    def __init__(
        self,
        transport: Transport,
        nodes: Sequence[Sequence[int]],
        buffer: Array,
        neighbors: Sequence[Array],
        barrier: Callable[[], None],
        segment_bytes: int = SEGMENT_BYTES,
        in_flight: int = SEGMENTS_IN_FLIGHT,
    ) -> None:
        self._traffic = transport.traffic
        node = next(node for node in nodes if transport.rank in node)
        own = node.index(transport.rank)
        count, elements = len(node), buffer.size
        self._size = transport.size
        self._barrier = barrier
        part = ring_schedule.shard(own, count, elements)
        # The ring's order: a part is summed from the rank after its own round to itself.
        self._values = [neighbors[(own + 1 + step) % count][part] for step in range(count)]
        self._own = buffer[part]
        self._crossing_bytes = 2 * (count - 1) * self._own.nbytes  # read in neighbours' memory, and written there
        self._sum: Array = np.empty(self._own.size, accumulator_dtype(buffer.dtype))
        self._between: RingReduction | None = None
        self.shard = part
        if len(nodes) > 1:
            counterparts = _Counterparts(transport, [ranks[own] for ranks in nodes])
            self._between = RingReduction(counterparts, self._own, segment_bytes, self._sum, in_flight=in_flight)
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
        self._barrier()  # nobody needs the values of before any more
        self._hand_out()

    def all_reduce(self, mean: bool) -> None:
        divisor = self._size if mean else 1
        if self._between is None:
            self._reduce_in_place(divisor)
        else:
            self._sum_node()
            self._between.reduce_and_divide(divisor)
            self._hand_out()

    def _sum_node(self, each: Each | None = None) -> None:
        """Sum this rank's part over the node, aside, in blocks that stay in the cache meanwhile."""
        self._barrier()  # everybody's values are there
        with quiet():
            for block in blocks(self._own):
                total = self._sum[block]
                _add_up([values[block] for values in self._values], total)
                if each is not None:
                    each(total)

    def _reduce_in_place(self, divisor: int) -> None:
        """Replace this rank's part by its sum, at every rank of the node."""
        self._barrier()  # everybody's values are there
        is_narrow = self._sum.dtype != self._own.dtype
        with quiet():
            for block in blocks(self._own):
                values = [part[block] for part in self._values]
                total = self._sum[: values[0].size] if is_narrow else values[0]
                _add_up(values, total)
                store(total, values[0], divisor)
                for place in values[1:]:
                    np.copyto(place, values[0])
        self._end()

    def _hand_out(self) -> None:
        """Write this rank's part into the memory of its neighbours."""
        for block in blocks(self._own):
            for place in self._values[:-1]:
                np.copyto(place[block], self._own[block])
        self._end()

    def _end(self) -> None:
        self._barrier()  # nobody writes here any more: the caller may read, and write
        self._traffic.count_collective(self._crossing_bytes)


def _add_up(terms: Sequence[Array], total: Array) -> None:
    """Sum, in order; ``total`` may be the first."""
    first, *others = terms
    if others and first.dtype == total.dtype:
        np.add(first, others.pop(0), out=total)  # one pass less than copying the first
    else:
        np.copyto(total, first)
    for term in others:
        np.add(total, term, out=total)


class _Counterparts:
    """Some of a transport's ranks, numbered anew: what a ring among them needs."""

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


def plan_node_reduction(
    transport: Transport, buffer: Array, segment_bytes: int = SEGMENT_BYTES, in_flight: int = SEGMENTS_IN_FLIGHT
) -> NodeReduction | None:
    """Plan it, if the ranks of each node can reach each other's ``buffer`` and every node has equally many of them.

    Collective if the transport knows of neighbours: all ranks come to the same answer.
    """
    if not isinstance(transport, SharedNode):
        return None
    same_node = transport.same_node
    about = allgather_object(transport, [list(same_node), export_handle(buffer)])
    nodes = sorted({tuple(node) for node, _ in about})
    if len({len(node) for node in nodes}) > 1 or len(nodes[0]) < 2:
        return None
    neighbors = []
    for rank in same_node:
        offered = about[rank][1]
        if rank == transport.rank and offered is not None:
            neighbors.append(buffer)
        elif offered is not None and (opened := import_handle(offered, buffer.size, buffer.dtype)) is not None:
            neighbors.append(opened)
    reached = np.array([len(neighbors) == len(same_node)])
    if not transport.allgather(reached).all():
        return None
    return NodeReduction(transport, nodes, buffer, neighbors, transport.node_barrier, segment_bytes, in_flight)
