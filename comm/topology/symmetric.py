"""Topologies with symmetric edges and equal shares in both directions: pairs, grids and cubes."""

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
    """Graphs in which each rank keeps and sends equal shares, and receives from those that it sends to."""

    @abstractmethod
    def _neighbors(self, rank: int, phase: int) -> Sequence[int]:
        """Return the neighbours of ``rank``. All ranks that have neighbours have the same number of them."""

    def peers_in(self, rank: int, phase: int) -> Peers:
        neighbors = self._neighbors(rank, phase)
        share = 1 / (len(neighbors) + 1)
        both = tuple((neighbor, share) for neighbor in neighbors)
        return Peers(both, both, share)


class _PairedGraphs(_SymmetricGraphs):
    """Graphs in which even rank 2a is paired with odd rank 2b + 1, b = a + shift modulo the number of even ranks."""

    def __init__(self, size: int) -> None:
        self._evens = (size + 1) // 2
        self._shifts = [0, *(1 << power for power in range(exponents(self._evens)))]
        super().__init__(size, len(self._shifts), name="BipartiteExponential")

    def _neighbors(self, rank: int, phase: int) -> Sequence[int]:
        shift = self._shifts[phase]
        if rank % 2 == 0:
            odd = 2 * ((rank // 2 + shift) % self._evens) + 1
            return [odd] if odd < self.size else []  # of an odd number of ranks, one has no partner
        return [2 * ((rank // 2 - shift) % self._evens)]


@dataclass(frozen=True)
class BipartiteExponential(Topology):
    """Pairs of an even and an odd rank exchange halves, at distances 1, 3, 5, 9, ..., 1 + 2^i in turn.

    One message per rank and step. Edges only connect even with odd ranks, which AD-PSGD needs to avoid deadlocks (Lian
    et al., ICML 2018). With an odd number of ranks, a different even rank has no partner at each step.

    Example:
        >>> print(BipartiteExponential().for_size(16))
        BipartiteExponential among 16 ranks: 4 graphs, doubly stochastic, spectral gap 1 per step
    """

    def plan(self, size: int) -> GraphSequence:
        return _PairedGraphs(size)


class _CubeGraphs(_SymmetricGraphs):
    """Graphs that connect ranks that differ in one binary digit: any digit, or digit k at step k."""

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
    """Each rank exchanges messages with the log2 n ranks that differ from it in one binary digit.

    The number of ranks n must be a power of 2. rho = 1 - 2 / (1 + log2 n).

    Example:
        >>> print(Hypercube().for_size(16))
        Hypercube among 16 ranks: 1 graph, doubly stochastic, spectral gap 0.4 per step
    """

    def plan(self, size: int) -> GraphSequence:
        _need_power_of_two(self, size)
        return _CubeGraphs(size, one_peer=False)


@dataclass(frozen=True)
class OnePeerHypercube(Topology):
    """Each rank exchanges halves at step k with the rank that differs from it in binary digit k mod log2 n.

    The number of ranks n must be a power of 2. Any log2 n consecutive steps average exactly, with symmetric edges and
    one message per rank and step.

    Example:
        >>> print(OnePeerHypercube().for_size(16))
        OnePeerHypercube among 16 ranks: 4 graphs, doubly stochastic, spectral gap 1 per step
    """

    def plan(self, size: int) -> GraphSequence:
        _need_power_of_two(self, size)
        return _CubeGraphs(size, one_peer=True)


def _need_power_of_two(topology: Topology, size: int) -> None:
    if size & (size - 1):
        raise ConfigurationError(
            f"{type(topology).__name__} needs a power of 2 as number of ranks, got {size}; "
            "OnePeerExponential and StaticExponential work with any number"
        )


class _TorusGraphs(_SymmetricGraphs):
    """Graphs of a grid with wrap-around: rank r is in row r // columns and column r % columns."""

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
    """A grid with wrap-around: each rank exchanges messages with its neighbours above, below, left and right, 1/5 each.

    Args:
        rows: number of rows, which divides the number of ranks. By default the largest that is not greater than the
            number of columns: a square if n is a square number, a ring if n is prime.

    Example:
        >>> print(Torus().for_size(16))
        Torus 4 x 4 among 16 ranks: 1 graph, doubly stochastic, spectral gap 0.4 per step
        >>> print(Torus(rows=2).for_size(16))
        Torus 2 x 8 among 16 ranks: 1 graph, doubly stochastic, spectral gap 0.1464 per step
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
