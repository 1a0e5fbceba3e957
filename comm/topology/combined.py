"""Topologies made of others: one after the other, or one among the leaders of nodes."""

from dataclasses import dataclass

from lentando.comm.checks import check_integer
from lentando.comm.errors import ConfigurationError
from lentando.comm.topology.base import GraphSequence, Topology
from lentando.comm.topology.peers import Peers

__all__ = ["Hybrid", "NodeAware"]


class _HybridGraphs(GraphSequence):
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
    """One topology for the first steps, another from then on: dense while parameters move fast, sparse after.

    ``Hybrid(PPeerExponential(2), 10_000, OnePeerExponential())`` is the hybrid of SGP (Assran et al., ICML 2019).
    Each part begins with its own first graph.

    Args:
        first: topology of steps 0 to ``steps`` - 1.
        steps: how long, >= 0.
        then: topology from step ``steps`` on.
    """

    first: Topology
    steps: int
    then: Topology

    def __post_init__(self) -> None:
        check_integer("steps", self.steps, 0, "steps of the first topology")

    def plan(self, size: int) -> GraphSequence:
        return _HybridGraphs(self.first.for_size(size), self.steps, self.then.for_size(size))


class _NodeAwareGraphs(GraphSequence):
    """Even steps average within nodes, odd steps are the inner graphs between leaders."""

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
            others = tuple((other, share) for other in range(start, start + self._local_size) if other != rank)
            return Peers(others, others, share)
        if local >= self._leaders:
            return Peers((), (), 1.0)
        peers = self._inner.peers_in(node, phase // 2)
        return Peers(
            tuple((other * self._local_size + local, share) for other, share in peers.out_neighbors),
            tuple((other * self._local_size + local, share) for other, share in peers.in_neighbors),
            peers.self_weight,
        )


@dataclass(frozen=True)
class NodeAware(Topology):
    """At even steps the ranks of each node average exactly; at odd steps its leaders gossip with those of others.

    The links between nodes carry ``leaders`` messages per node every second step. That is also the price: a leader
    holds 1 / local_size of its node's mass, so two steps do to the nodes' means what I + (leaders / local_size)(P -
    I) does, with P the inner matrix. With ``leaders=local_size`` all ranks gossip, each with its counterparts on
    other nodes, and two steps mix the nodes as one step of ``inner`` does.

    Args:
        inner: topology of the nodes.
        local_size: ranks per node; rank r is on node r // local_size. Must divide the number of ranks.
        leaders: ranks of each node that gossip, ``1 <= leaders <= local_size``.
    """

    inner: Topology
    local_size: int
    leaders: int = 1

    def __post_init__(self) -> None:
        check_integer("local_size", self.local_size, 1, "ranks of a node")
        check_integer("leaders", self.leaders, 1, "ranks of a node that talk to others")
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
