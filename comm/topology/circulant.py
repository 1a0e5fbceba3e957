"""Topologies in which all ranks send over the same distances, their hops: rank r sends to r + hop, modulo the size."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TypeAlias

from lentando.comm.checks import check_integer
from lentando.comm.errors import ConfigurationError
from lentando.comm.topology.base import GraphSequence, Topology
from lentando.comm.topology.checks import check_graphs
from lentando.comm.topology.peers import Peers

__all__ = ["Circulant", "Complete", "OnePeerExponential", "PPeerExponential", "Ring", "StaticExponential"]

Hops: TypeAlias = tuple[int, ...]
"""Distances to one step's out-neighbours, ``0 < hop < size``."""


class CirculantGraphs(GraphSequence):
    """Graphs in which rank r keeps one share and sends equal shares to r + hop, modulo the size, for each hop.

    Each rank receives as many messages as it sends, so the matrices are doubly stochastic.

    Args:
        size: number of ranks.
        hops: distances to the out-neighbours, for each step of the period.
        name: name in messages and pictures.
    """

    def __init__(self, size: int, hops: Sequence[Hops], name: str) -> None:
        super().__init__(size, len(hops), name=name)
        self._hops = hops

    def peers_in(self, rank: int, phase: int) -> Peers:
        hops, size = self._hops[phase], self.size
        share = 1 / (len(hops) + 1)
        return Peers(
            tuple(((rank + hop) % size, share) for hop in hops),
            tuple(((rank - hop) % size, share) for hop in hops),
            share,
        )


def distinct_hops(hops: Iterable[int], size: int) -> Hops:
    """Return the hops modulo ``size`` in order, without 0 (edges from a rank to itself) and duplicates."""
    return tuple(dict.fromkeys(hop % size for hop in hops if hop % size))


def exponents(size: int, base: int = 2) -> int:
    """Return ceil(log_base(size)), the number of powers of ``base`` below ``size``, by integer arithmetic."""
    count, power = 0, 1
    while power < size:
        count, power = count + 1, power * base
    return count


@dataclass(frozen=True)
class Ring(Topology):
    """Each rank exchanges messages with the next and the previous rank, 1/3 each: two messages per rank and step.

    Mixes slowly: rho = (1 + 2 cos(2 pi / n)) / 3, so the number of steps until ranks agree grows as n^2.

    Example:
        >>> print(Ring().for_size(16))
        Ring among 16 ranks: 1 graph, doubly stochastic, spectral gap 0.05075 per step
    """

    def plan(self, size: int) -> GraphSequence:
        return CirculantGraphs(size, [distinct_hops((1, -1), size)], "Ring")


@dataclass(frozen=True)
class Complete(Topology):
    """Each rank sends to all others, 1/n each: the exact average in one step, with n - 1 messages per rank.

    Example:
        >>> print(Complete().for_size(16))
        Complete among 16 ranks: 1 graph, doubly stochastic, spectral gap 1 per step
    """

    def plan(self, size: int) -> GraphSequence:
        return CirculantGraphs(size, [tuple(range(1, size))], "Complete")


@dataclass(frozen=True)
class StaticExponential(Topology):
    """Each rank r sends to ranks r + 1, r + 2, r + 4, ..., modulo n: ceil(log2 n) messages per rank and step.

    rho = 1 - 2 / (1 + ceil(log2 n)) for even n, less for odd n (Ying et al., NeurIPS 2021, arXiv 2110.13363).

    Example:
        >>> print(StaticExponential().for_size(16))
        StaticExponential among 16 ranks: 1 graph, doubly stochastic, spectral gap 0.4 per step
    """

    def plan(self, size: int) -> GraphSequence:
        return CirculantGraphs(size, [tuple(1 << power for power in range(exponents(size)))], "StaticExponential")


@dataclass(frozen=True)
class OnePeerExponential(Topology):
    """Each rank r sends half of its mass at step k to rank r + 2^(k mod ceil(log2 n)): one message per rank and step.

    For n = 2^K any K consecutive steps average exactly (Ying et al., NeurIPS 2021, arXiv 2110.13363; the graph
    is that of SGP, Assran et al., ICML 2019). For other n, a period shrinks any disagreement to at most the
    maximum over m = 1..n-1 of ``|sin(pi m 2^K / n) / (2^K sin(pi m / n))|``.

    Example:
        >>> print(OnePeerExponential().for_size(16))
        OnePeerExponential among 16 ranks: 4 graphs, doubly stochastic, spectral gap 1 per step
        >>> print(OnePeerExponential().for_size(12))
        OnePeerExponential among 12 ranks: 4 graphs, doubly stochastic, spectral gap 0.3238 per step
    """

    def plan(self, size: int) -> GraphSequence:
        hops = [(1 << power,) for power in range(exponents(size))]
        return CirculantGraphs(size, hops or [()], "OnePeerExponential")


@dataclass(frozen=True)
class PPeerExponential(Topology):
    """Each rank r sends ``peers`` messages per step: at step k to ranks r + b^k, r + 2 b^k, ..., r + peers b^k.

    The base is b = peers + 1, and k is taken modulo K = ceil(log_b n). For n = b^K any K consecutive steps average
    exactly. Hops that coincide modulo n, or lead to the sender, are left out, and the shares of the others are equal.

    Args:
        peers: number of out-neighbours per step, >= 1; with 1 it is ``OnePeerExponential``.

    Example:
        >>> print(PPeerExponential(3).for_size(16))
        PPeerExponential(3) among 16 ranks: 2 graphs, doubly stochastic, spectral gap 1 per step
    """

    peers: int

    def __post_init__(self) -> None:
        check_integer("peers", self.peers, 1, "out-neighbours per step")

    def plan(self, size: int) -> GraphSequence:
        base = self.peers + 1
        hops = [
            distinct_hops((digit * base**place for digit in range(1, base)), size)
            for place in range(exponents(size, base))
        ]
        return CirculantGraphs(size, hops or [()], f"PPeerExponential({self.peers})")


class Circulant(Topology):
    """Each rank r sends equal shares at step k to rank r + hop, modulo n, for each hop of ``hops[k mod len(hops)]``.

    Args:
        hops: distances to the out-neighbours for each step of the period; negative ones point backwards.

    Raises:
        ConfigurationError: when planned, if two hops of a step lead to the same rank or one leads to the sender, or
            if the hops of a period do not connect all ranks.

    Example:
        >>> print(Circulant([[1], [-1], [5]]).for_size(16))
        Circulant among 16 ranks: 3 graphs, doubly stochastic, spectral gap 0.1215 per step
    """

    def __init__(self, hops: Sequence[Sequence[int]]) -> None:
        self._hops = tuple(tuple(step) for step in hops)
        if not self._hops:
            raise ConfigurationError("hops must contain the out-neighbours of at least one step, got none")

    def plan(self, size: int) -> GraphSequence:
        graphs = CirculantGraphs(size, [tuple(hop % size for hop in step) for step in self._hops], "Circulant")
        check_graphs(graphs)
        return graphs
