"""Topologies made of others: one after the other, or one between nodes."""

from dataclasses import dataclass

from lentando.comm.checks import check_integer
from lentando.comm.errors import ConfigurationError
from lentando.comm.topology.base import GraphSequence, Topology
from lentando.comm.topology.peers import Peers

__all__ = ["Hybrid", "NodeAware"]


class _HybridGraphs(GraphSequence):
    """The graphs of ``first`` for the first steps, then those of ``then``."""

    def __init__(self, first: GraphSequence, steps: int, then: GraphSequence) -> None:
        super().__init__(
            then.size,
            then.period_steps,
            lead_steps=steps + then.lead_steps,
            name=f"{first.name} for {steps} steps, then {then.name}",
        )
        self._first, self._steps, self._then = first, steps, then

    @property
    def phases(self) -> int:
        return self._first.phases + self._then.phases

    def phase(self, step: int) -> int:
        if step < self._steps:
            return self._first.phase(step)
        return self._first.phases + self._then.phase(step - self._steps)

    def peers_in(self, rank: int, phase: int) -> Peers:
        if phase < self._first.phases:
            return self._first.peers_in(rank, phase)
        return self._then.peers_in(rank, phase - self._first.phases)


@dataclass(frozen=True)
class Hybrid(Topology):
    """One topology for the first steps and another afterwards: dense while parameters move fast, then sparse.

    ``Hybrid(PPeerExponential(2), 10_000, OnePeerExponential())`` is the hybrid of SGP (Assran et al., ICML 2019).
    Each topology begins with its first graph.

    Args:
        first: topology of steps 0 to ``steps`` - 1.
        steps: number of steps of the first topology, >= 0.
        then: topology of all later steps.

    Example:
        >>> from lentando.comm.topology import Complete, Hybrid, OnePeerExponential
        >>> graphs = Hybrid(Complete(), 1000, OnePeerExponential()).for_size(8)
        >>> [len(graphs.peers(rank=0, step=step).out_neighbors) for step in (0, 999, 1000, 1001)]
        [7, 7, 1, 1]
    """

    first: Topology
    steps: int
    then: Topology

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 0, "steps of the first topology")

    def plan(self, size: int) -> GraphSequence:
        return _HybridGraphs(self.first.for_size(size), self.steps, self.then.for_size(size))


class _NodeAwareGraphs(GraphSequence):
    """Graphs that average within nodes at even steps, and connect the leaders of nodes at odd steps."""

    def __init__(self, inner: GraphSequence, local_size: int, leaders: int) -> None:
        super().__init__(
            inner.size * local_size,
            2 * inner.period_steps,
            lead_steps=2 * inner.lead_steps,
            name=f"NodeAware({inner.name}), {inner.size} nodes of {local_size}",
        )
        self._inner, self._local_size, self._leaders = inner, local_size, leaders

    @property
    def phases(self) -> int:
        return 2 * self._inner.phases

    def phase(self, step: int) -> int:
        return 2 * self._inner.phase(step // 2) + step % 2

    def peers_in(self, rank: int, phase: int) -> Peers:
        node, local = divmod(rank, self._local_size)
        if phase % 2 == 0:
            share = 1 / self._local_size
            start = node * self._local_size
            neighbors = tuple((peer, share) for peer in range(start, start + self._local_size) if peer != rank)
            return Peers(neighbors, neighbors, share)
        if local >= self._leaders:
            return Peers((), (), 1.0)
        peers = self._inner.peers_in(node, phase // 2)
        return Peers(
            tuple((peer * self._local_size + local, share) for peer, share in peers.out_neighbors),
            tuple((peer * self._local_size + local, share) for peer, share in peers.in_neighbors),
            peers.self_weight,
        )


@dataclass(frozen=True)
class NodeAware(Topology):
    """The ranks of each node average exactly at even steps; the leaders of the nodes gossip at odd steps.

    The links between nodes carry ``leaders`` messages per node every second step. The price is slower mixing: a leader
    holds 1 / local_size of the mass of its node, so two steps multiply the means of the nodes by
    I + (leaders / local_size)(P - I), with P the inner matrix. With ``leaders=local_size`` all ranks gossip, each with
    those of the same local rank on other nodes, and two steps mix the nodes as one step of ``inner`` does.

    Args:
        inner: topology of the nodes.
        local_size: number of ranks per node: rank r is on node r // local_size. Must divide the number of ranks.
        leaders: number of ranks of each node that gossip, ``1 <= leaders <= local_size``.

    Example:
        >>> from lentando.comm.topology import NodeAware, OnePeerExponential
        >>> graphs = NodeAware(OnePeerExponential(), local_size=4).for_size(16)
        >>> [graphs.peers(rank=0, step=step).out_neighbors for step in (0, 1)]
        [((1, 0.25), (2, 0.25), (3, 0.25)), ((4, 0.5),)]
    """

    inner: Topology
    local_size: int
    leaders: int = 1

    def __post_init__(self) -> None:
        check_integer("local_size", self.local_size, 1, "ranks of a node")
        check_integer("leaders", self.leaders, 1, "ranks of a node that gossip with other nodes")
        if self.leaders > self.local_size:
            raise ConfigurationError(
                f"leaders must be between 1 and local_size, got leaders={self.leaders}, local_size={self.local_size}"
            )

    def plan(self, size: int) -> GraphSequence:
        if size % self.local_size:
            raise ConfigurationError(
                f"NodeAware needs nodes of equally many ranks, got {size} ranks, no multiple of "
                f"local_size={self.local_size}"
            )
        inner = self.inner.for_size(size // self.local_size)
        return inner if self.local_size == 1 else _NodeAwareGraphs(inner, self.local_size, self.leaders)
