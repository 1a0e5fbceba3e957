"""All-reduce where ranks of a node read each other's memory, and only sums of a node cross the links.

Each rank of a node sums one part of the buffer over the node, straight from its neighbours' memory; between nodes that
part goes round the ring of the ranks that have the same part; at the end each rank copies the finished parts of its
node. A link so carries 2(N - 1)/N of the buffer for N nodes, however many ranks a node has.
"""

from collections.abc import Callable, Sequence

import numpy as np

from lentando.comm import ring
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.flat import BLOCK
from lentando.comm.objects import allgather_object
from lentando.comm.reductions.reduction import Each, quiet, store
from lentando.comm.reductions.ring import SEGMENT_BYTES, SEGMENTS_IN_FLIGHT, RingReduction
from lentando.comm.shared_memory import offer, open_offer
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
        part = ring.shard(own, count, elements)
        # The ring's order: a part is summed from the rank after its own round to itself.
        self._terms = [neighbors[(own + 1 + step) % count][part] for step in range(count)]
        self._own = buffer[part]
        self._others = [
            (buffer[theirs], neighbors[rank][theirs])
            for rank in ((own + step) % count for step in range(1, count))
            for theirs in [ring.shard(rank, count, elements)]
        ]
        self._sent_bytes = 2 * buffer.nbytes * (count - 1) // count  # what the others read here
        self._scratch = np.empty(min(BLOCK, self._own.size), accumulator_dtype(buffer.dtype))
        self._sum = np.empty(self._own.size, accumulator_dtype(buffer.dtype))
        self._between: RingReduction | None = None
        self.shard = part
        if len(nodes) > 1:
            counterparts = _Counterparts(transport, [ranks[own] for ranks in nodes])
            self._between = RingReduction(counterparts, self._own, segment_bytes, self._sum, in_flight=in_flight)
            within = self._between.shard
            self.shard = slice(part.start + within.start, part.start + within.stop)

    def reduce_scatter(self, each: Each | None = None) -> Array:
        if self._between is None:
            self._sum_node(self._sum, each)
            return self._sum
        self._sum_node(self._sum)
        return self._between.reduce_scatter(each)

    def all_gather(self) -> None:
        if self._between is not None:
            self._between.all_gather()
        self._copy_others()

    def _copy_others(self) -> None:
        self._barrier()  # everybody's part is finished, and nobody reads the values of before any more
        for own, theirs in self._others:
            np.copyto(own, theirs)
        self._barrier()  # nobody reads here any more: the caller may write
        self._traffic.count_collective(self._sent_bytes)

    def all_reduce(self, mean: bool) -> None:
        divisor = self._size if mean else 1
        if self._between is None:
            self._sum_node(self._own, divisor=divisor)
        else:
            self._sum_node(self._sum)
            self._between.both_halves(divisor)
        self._copy_others()

    def _sum_node(self, into: Array, each: Each | None = None, divisor: int = 1) -> None:
        """Sum this rank's part over the node, in pieces that stay in the cache meanwhile."""
        self._barrier()  # everybody's values are there
        scratch, (first, *others) = self._scratch, self._terms
        # Not where that would overwrite this rank's own values, the last to be added.
        straight = into.dtype == scratch.dtype and (into is not self._own or len(self._terms) == 2)
        with quiet():
            for start in range(0, into.size, BLOCK):
                block = slice(start, start + BLOCK)
                out = into[block]
                total = out if straight else scratch[: out.size]
                if others and first.dtype == total.dtype:
                    np.add(first[block], others[0][block], out=total)  # one pass less than copying the first
                    rest = others[1:]
                else:
                    np.copyto(total, first[block])
                    rest = others
                for term in rest:
                    np.add(total, term[block], out=total)
                store(total, out, divisor)
                if each is not None:
                    each(out)


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
    """Plan it, if the ranks of each node can read each other's ``buffer`` and every node has equally many of them.

    Collective if the transport knows of neighbours: all ranks come to the same answer.
    """
    if not isinstance(transport, SharedNode):
        return None
    same_node = transport.same_node
    about = allgather_object(transport, [list(same_node), offer(buffer)])
    nodes = sorted({tuple(node) for node, _ in about})
    if len({len(node) for node in nodes}) > 1 or len(nodes[0]) < 2:
        return None
    neighbors = []
    for rank in same_node:
        offered = about[rank][1]
        if rank == transport.rank and offered is not None:
            neighbors.append(buffer)
        elif offered is not None and (opened := open_offer(offered, buffer.size, buffer.dtype)) is not None:
            neighbors.append(opened)
    reached = np.array([len(neighbors) == len(same_node)])
    if not transport.allgather(reached).all():
        return None
    return NodeReduction(transport, nodes, buffer, neighbors, transport.node_barrier, segment_bytes, in_flight)
