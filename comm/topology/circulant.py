"""Topologies in which every rank does the same: send to the ranks that are so many places further on."""

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
    """Rank r sends equal shares to itself and to r + hop, modulo the size, for each hop of the step.

    Every rank hears as many as it sends to: the matrices are doubly stochastic.
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
    """Each hop modulo ``size``, once, in order, without 0: no self edges and no duplicates."""
    return tuple(dict.fromkeys(hop % size for hop in hops if hop % size))


def exponents(size: int, base: int = 2) -> int:
    """Number of powers of ``base``, from 1 on, below ``size``: ceil(log_base(size)), in integers."""
    count, power = 0, 1
    while power < size:
        count, power = count + 1, power * base
    return count


@dataclass(frozen=True)
class Ring(Topology):
    """Every rank exchanges with the next and the previous one, 1/3 each: two messages per rank and step.

    Mixes slowly: rho = (1 + 2 cos(2 pi / n)) / 3, so the number of steps to agree grows as n^2.
    """

    def plan(self, size: int) -> GraphSequence:
        return CirculantGraphs(size, [distinct_hops((1, -1), size)], "Ring")


@dataclass(frozen=True)
class Complete(Topology):
    """Every rank sends to every other, 1/n each: the exact average in one step, for n - 1 messages per rank."""

    def plan(self, size: int) -> GraphSequence:
        return CirculantGraphs(size, [tuple(range(1, size))], "Complete")


@dataclass(frozen=True)
class StaticExponential(Topology):
    """Every rank sends to those 1, 2, 4, ... places further on, ceil(log2 n) messages per rank and step.

    rho = 1 - 2 / (1 + ceil(log2 n)) for even n, less for odd n (Ying et al., NeurIPS 2021, arXiv 2110.13363).
    """

    def plan(self, size: int) -> GraphSequence:
        return CirculantGraphs(size, [tuple(1 << power for power in range(exponents(size)))], "StaticExponential")


@dataclass(frozen=True)
class OnePeerExponential(Topology):
    """One message per rank and step: at step k, half of what it has to the rank 2^(k mod ceil(log2 n)) further on.

    For n = 2^K any K consecutive steps average exactly (Ying et al., NeurIPS 2021, arXiv 2110.13363; the graph
    is that of SGP, Assran et al., ICML 2019). For other n they do not; a period then shrinks any disagreement
    to at most max over m = 1..n-1 of |sin(pi m 2^K / n) / (2^K sin(pi m / n))|.
    """

    def plan(self, size: int) -> GraphSequence:
        hops = [(1 << power,) for power in range(exponents(size))]
        return CirculantGraphs(size, hops or [()], "OnePeerExponential")


@dataclass(frozen=True)
class PPeerExponential(Topology):
    """``peers`` messages per rank and step: at digit i, to the ranks b^i, 2 b^i, ..., peers b^i further on.

    The base is b = peers + 1. For n = b^K any K consecutive steps average exactly. Where hops coincide modulo n, or
    come home, there are fewer of them and the shares are equal again.

    Args:
        peers: out-neighbours per step, >= 1; 1 is ``OnePeerExponential``.
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
    """Hops of your own: at step k, every rank sends equal shares to the ranks ``hops[k mod len(hops)]`` further on.

    Args:
        hops: for each step of the period, the distances to its out-neighbours; negative ones count backwards.

    Raises:
        ConfigurationError: when planned, if two hops of a step lead to the same rank or one leads to the sender, or
            if the hops of a period do not connect all ranks.
    """

    def __init__(self, hops: Sequence[Sequence[int]]) -> None:
        self._hops = tuple(tuple(step) for step in hops)
        if not self._hops:
            raise ConfigurationError("hops must name the out-neighbours of at least one step, got none")

    def plan(self, size: int) -> GraphSequence:
        graphs = CirculantGraphs(size, [tuple(hop % size for hop in step) for step in self._hops], "Circulant")
        check_graphs(graphs)
        return graphs
