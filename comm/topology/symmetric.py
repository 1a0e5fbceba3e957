"""Topologies whose edges go both ways with equal shares: pairs, grids and cubes."""

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt

from lentando.comm.checks import check_integer
from lentando.comm.errors import ConfigurationError
from lentando.comm.topology.base import GraphSequence, Topology
from lentando.comm.topology.circulant import distinct_hops, exponents
from lentando.comm.topology.peers import Peers

__all__ = ["BipartiteExponential", "Hypercube", "OnePeerHypercube", "Torus"]


class _SymmetricGraphs(GraphSequence):
    """Each rank keeps and sends equal shares, and hears exactly those it sends to."""

    @abstractmethod
    def _neighbors(self, rank: int, phase: int) -> Sequence[int]:
        """Those that ``rank`` exchanges with: equally many for all ranks that exchange at all."""

    def peers_in(self, rank: int, phase: int) -> Peers:
        neighbors = self._neighbors(rank, phase)
        share = 1 / (len(neighbors) + 1)
        both = tuple((neighbor, share) for neighbor in neighbors)
        return Peers(both, both, share)


class _PairedGraphs(_SymmetricGraphs):
    """Even rank 2a meets odd rank 2b + 1 with b = a + shift, modulo the number of even ranks."""

    def __init__(self, size: int) -> None:
        self._evens = (size + 1) // 2
        self._shifts = [0, *(1 << power for power in range(exponents(self._evens)))]
        super().__init__(size, len(self._shifts), name="BipartiteExponential")

    def _neighbors(self, rank: int, phase: int) -> Sequence[int]:
        shift = self._shifts[phase]
        if rank % 2 == 0:
            odd = 2 * ((rank // 2 + shift) % self._evens) + 1
            return [odd] if odd < self.size else []  # of an odd number of ranks, one is left over at each step
        return [2 * ((rank // 2 - shift) % self._evens)]


@dataclass(frozen=True)
class BipartiteExponential(Topology):
    """An even and an odd rank swap halves, 1, 3, 5, 9, ..., 1 + 2^i apart in turn: one message per rank and step.

    Edges only join even with odd ranks, as AD-PSGD needs to be free of deadlock (Lian et al., ICML 2018). With an odd
    number of ranks, one even rank rests at each step, another one each time.
    """

    def plan(self, size: int) -> GraphSequence:
        return _PairedGraphs(size)


class _CubeGraphs(_SymmetricGraphs):
    """Ranks that differ in one binary digit: in any at each step, or in digit k at step k."""

    def __init__(self, size: int, one_peer: bool) -> None:
        self._digits = exponents(size)
        self._one_peer = one_peer
        period_steps = max(1, self._digits) if one_peer else 1
        super().__init__(size, period_steps, name="OnePeerHypercube" if one_peer else "Hypercube")

    def _neighbors(self, rank: int, phase: int) -> Sequence[int]:
        if self._one_peer:
            return [rank ^ (1 << phase)] if self._digits else []
        return [rank ^ (1 << digit) for digit in range(self._digits)]


@dataclass(frozen=True)
class Hypercube(Topology):
    """Each rank exchanges with the log2 n ranks that differ from it in one binary digit; n must be a power of 2.

    rho = 1 - 2 / (1 + log2 n).
    """

    def plan(self, size: int) -> GraphSequence:
        _need_power_of_two(self, size)
        return _CubeGraphs(size, one_peer=False)


@dataclass(frozen=True)
class OnePeerHypercube(Topology):
    """Each rank swaps halves with the rank that differs in binary digit k mod log2 n; n must be a power of 2.

    Any log2 n consecutive steps average exactly, with edges that go both ways and one message per rank and step.
    """

    def plan(self, size: int) -> GraphSequence:
        _need_power_of_two(self, size)
        return _CubeGraphs(size, one_peer=True)


def _need_power_of_two(topology: Topology, size: int) -> None:
    if size & (size - 1):
        raise ConfigurationError(
            f"{type(topology).__name__} needs a power of 2 as number of ranks, got {size}; "
            "OnePeerExponential and StaticExponential take any"
        )


class _TorusGraphs(_SymmetricGraphs):
    """Rank r sits in row r // columns and column r % columns of a grid whose ends meet."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__(rows * columns, 1, name=f"Torus {rows} x {columns}")
        self._columns = columns
        self._down = distinct_hops((1, -1), rows)
        self._right = distinct_hops((1, -1), columns)
        self._rows = rows

    def _neighbors(self, rank: int, phase: int) -> Sequence[int]:
        row, column = divmod(rank, self._columns)
        return [
            *((row + hop) % self._rows * self._columns + column for hop in self._down),
            *(row * self._columns + (column + hop) % self._columns for hop in self._right),
        ]


@dataclass(frozen=True)
class Torus(Topology):
    """A grid whose ends meet: each rank exchanges with the one above, below, left and right, 1/5 each.

    Args:
        rows: rows of the grid; must divide the number of ranks. By default the most that make no more rows than
            columns: a square if n is one, a ring if n is prime.
    """

    rows: int | None = None

    def __post_init__(self) -> None:
        if self.rows is not None:
            check_integer("rows", self.rows, 1, "rows of the grid")

    def plan(self, size: int) -> GraphSequence:
        rows = self.rows if self.rows is not None else max(r for r in range(1, isqrt(size) + 1) if size % r == 0)
        if rows < 1 or size % rows:
            raise ConfigurationError(f"a torus of {rows} rows needs a multiple of {rows} ranks, got {size}")
        return _TorusGraphs(rows, size // rows)
