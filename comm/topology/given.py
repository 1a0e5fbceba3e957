"""Topologies from mixing matrices and networkx graphs, which are checked when they are given."""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any, Protocol, TypeAlias
from zlib import crc32

import numpy as np
from numpy.typing import ArrayLike, NDArray

from lentando.comm.errors import ConfigurationError
from lentando.comm.topology.base import GraphSequence, Topology
from lentando.comm.topology.checks import check_connected
from lentando.comm.topology.peers import Peers
from lentando.comm.topology.spectrum import SUM_TOLERANCE, stochasticity

__all__ = ["FromGraph", "FromMatrix", "NetworkxGraph"]

_Matrix: TypeAlias = NDArray[np.float64]


class _MatrixGraphs(GraphSequence):
    """The graphs of given matrices: an edge for each positive entry."""

    def __init__(self, matrices: Sequence[_Matrix], name: str) -> None:
        super().__init__(len(matrices[0]), len(matrices), name=name)
        self._planned = [[_peers_of(rank, matrix) for rank in range(self.size)] for matrix in matrices]

    def peers_in(self, rank: int, phase: int) -> Peers:
        return self._planned[phase][rank]

    @property
    def checksum(self) -> str:
        """Text that is equal for equal matrices, by which ranks and checkpoints compare topologies."""
        return f"{crc32(repr(self._planned).encode()):08x}"

    def __repr__(self) -> str:
        return f"{self.name}({self.checksum})"


def _peers_of(rank: int, matrix: _Matrix) -> Peers:
    column, row = matrix[:, rank], matrix[rank]
    return Peers(
        tuple((int(peer), float(column[peer])) for peer in np.flatnonzero(column) if peer != rank),
        tuple((int(peer), float(row[peer])) for peer in np.flatnonzero(row) if peer != rank),
        float(matrix[rank, rank]),
    )


class FromMatrix(Topology):
    """A given mixing matrix, or several in turn.

    Args:
        matrices: mixing matrix, shape ``(n, n)``, or one per step of the period, shape ``(steps, n, n)``. ``P[i, j]``
            is the share of j's message that i receives. Columns sum to 1 (to 1e-6; they are divided by their sums), and
            the diagonal is positive. If rows sum to 1 as well, w stays 1. A matrix in the other convention, ``W[i, j]``
            from i to j, is the transpose.

    Raises:
        ConfigurationError: for any other shape, entries that are negative or not finite, columns that do not sum to 1,
            a zero on the diagonal, or ranks that are not connected; when planned, for another number of ranks.

    Example:
        >>> print(FromMatrix([[0.5, 0, 0.5], [0.5, 0.5, 0], [0, 0.5, 0.5]]).for_size(3))
        FromMatrix among 3 ranks: 1 graph, doubly stochastic, spectral gap 0.5 per step
    """

    def __init__(self, matrices: ArrayLike) -> None:
        try:
            given = np.array(matrices, np.float64)
        except (ValueError, TypeError):
            raise ConfigurationError("the mixing matrices must be numbers, and all of the same shape (n, n)") from None
        if given.ndim == 2:
            given = given[np.newaxis]
        if given.ndim != 3 or given.shape[1] != given.shape[2] or 0 in given.shape:
            raise ConfigurationError(
                "expected a mixing matrix of shape (n, n), or several of shape (steps, n, n), got shape "
                f"{np.shape(matrices)}"
            )
        for step, matrix in enumerate(given):
            _check_matrix(matrix, f"the mixing matrix of step {step}" if len(given) > 1 else "the mixing matrix")
        given /= given.sum(axis=1, keepdims=True)  # of each matrix, the columns
        self._graphs = _MatrixGraphs(list(given), "FromMatrix")
        check_connected(self._graphs)

    def plan(self, size: int) -> GraphSequence:
        return _of_size(self._graphs, size, "the mixing matrix")

    def describe(self) -> dict[str, str]:
        """Return the values by which ranks and checkpoints compare topologies."""
        return {"checksum": self._graphs.checksum}

    def __repr__(self) -> str:
        return repr(self._graphs)


def _check_matrix(matrix: _Matrix, label: str) -> None:
    bad = np.argwhere(~np.isfinite(matrix) | (matrix < 0))
    if bad.size:
        i, j = map(int, bad[0])
        raise ConfigurationError(
            f"{label} has P[{i}, {j}] = {matrix[i, j]:g}, the share of rank {j}'s message that rank {i} receives: "
            "expected a finite number >= 0"
        )
    kind = stochasticity(matrix)
    if kind in ("row", "none"):
        sums = matrix.sum(axis=0)
        column = int(np.argmax(np.abs(sums - 1)))
        hint = "; its rows do: give the transpose" if kind == "row" else ""
        raise ConfigurationError(
            f"{label} is not column-stochastic: column {column}, the shares that rank {column} sends and keeps, sums "
            f"to {sums[column]:.6g}, expected 1 (to {SUM_TOLERANCE:g}){hint}"
        )
    empty = np.flatnonzero(np.diagonal(matrix) <= 0)
    if empty.size:
        rank = int(empty[0])
        raise ConfigurationError(
            f"{label} has P[{rank}, {rank}] = 0: rank {rank} must keep a positive share, or its push-sum weight may "
            "become 0. (P + I) / 2 has the same edges"
        )


def _of_size(graphs: GraphSequence, size: int, label: str) -> GraphSequence:
    if graphs.size != size:
        raise ConfigurationError(f"{label} is for {graphs.size} ranks, but the job has {size}")
    return graphs


class NetworkxGraph(Protocol):
    """The part of a networkx graph that ``FromGraph`` uses."""

    @property
    def nodes(self) -> Iterable[Any]:
        """The nodes, which must be the ranks."""

    @property
    def edges(self) -> Any:
        """The edges, as pairs or longer tuples; ``edges[sender, receiver]`` is a mapping of attributes."""

    def is_directed(self) -> bool:
        """Whether edges have a direction."""


class FromGraph(Topology):
    """A given networkx graph, or several in turn. The nodes are the ranks 0 to n - 1; along edge (j, i), j sends to i.

    Without ``share``, each rank of a digraph keeps one share and sends equal shares to its out-neighbours (column
    stochastic). In an undirected graph, the share of both directions of an edge is 1 / (1 + the larger degree of its
    two ends) (doubly stochastic: Metropolis weights, Xiao, Boyd and Kim, J. Parallel Distrib. Comput. 2007).

    Args:
        graphs: a ``networkx.Graph`` or ``DiGraph``, or a sequence of them, one per step of the period.
        share: name of the edge attribute that holds the share of j's message that i receives. Rank j keeps the rest.

    Raises:
        ConfigurationError: if nodes are not the ranks, an edge connects a rank with itself or is listed twice, shares
            leave the sender no positive rest, or ranks are not connected; when planned, for another number of ranks.

    Example:
        >>> import networkx
        >>> print(FromGraph(networkx.star_graph(4)).for_size(5))  # one hub and four others
        FromGraph among 5 ranks: 1 graph, doubly stochastic, spectral gap 0.2 per step
    """

    def __init__(self, graphs: NetworkxGraph | Sequence[NetworkxGraph], *, share: str | None = None) -> None:
        steps = list(graphs) if isinstance(graphs, Sequence) else [graphs]
        if not steps:
            raise ConfigurationError("expected at least one graph, got none")
        size = len(list(steps[0].nodes))
        matrices = [_matrix_of(graph, size, share) for graph in steps]
        self._graphs = _MatrixGraphs(matrices, "FromGraph")
        check_connected(self._graphs)

    def plan(self, size: int) -> GraphSequence:
        return _of_size(self._graphs, size, "the graph")

    def describe(self) -> dict[str, str]:
        """Return the values by which ranks and checkpoints compare topologies."""
        return {"checksum": self._graphs.checksum}

    def __repr__(self) -> str:
        return repr(self._graphs)


def _matrix_of(graph: NetworkxGraph, size: int, share: str | None) -> _Matrix:
    if set(graph.nodes) != set(range(size)) or size == 0:
        raise ConfigurationError(
            f"the nodes of a graph must be the ranks 0 to n - 1, equally many at each step ({size} in the first), "
            f"got {sorted(graph.nodes, key=repr)[:8]}; networkx.convert_node_labels_to_integers renames them"
        )
    edges = [(int(sender), int(receiver)) for sender, receiver, *_ in graph.edges]
    for (sender, receiver), count in Counter(edges).items():
        if sender == receiver:
            raise ConfigurationError(
                f"edge ({sender}, {receiver}) connects a rank with itself; the share that a rank keeps is not an edge"
            )
        if count > 1:
            raise ConfigurationError(f"edge ({sender}, {receiver}) is listed {count} times, expected once")
    if not graph.is_directed():
        edges += [(receiver, sender) for sender, receiver in edges]
    matrix = np.zeros((size, size))
    degree = Counter(sender for sender, _ in edges)
    for sender, receiver in edges:
        if share is not None:
            matrix[receiver, sender] = _given_share(graph, sender, receiver, share)
        elif graph.is_directed():
            matrix[receiver, sender] = 1 / (1 + degree[sender])
        else:
            matrix[receiver, sender] = 1 / (1 + max(degree[sender], degree[receiver]))
    kept = 1 - matrix.sum(axis=0)
    if kept.min() <= SUM_TOLERANCE:
        rank = int(np.argmin(kept))
        raise ConfigurationError(
            f"rank {rank} sends shares that sum to {1 - kept[rank]:g}: expected less than 1, so that it keeps a share"
        )
    matrix[np.diag_indices(size)] = kept
    return matrix


def _given_share(graph: NetworkxGraph, sender: int, receiver: int, share: str) -> float:
    value = graph.edges[sender, receiver].get(share)
    if not isinstance(value, int | float) or not 0 < value < 1:
        raise ConfigurationError(
            f"edge ({sender}, {receiver}) has {share!r} = {value!r}: expected a share between 0 and 1"
        )
    return float(value)
