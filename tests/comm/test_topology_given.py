"""Topologies that users bring along, and the checks that say what is wrong with them."""

from collections.abc import Callable

import networkx as nx  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lentando.comm.errors import ConfigurationError
from lentando.comm.topology import FromGraph, FromMatrix, GraphSequence, Peers, check_graphs, stochasticity
from lentando.comm.topology.checks import check_connected

# Columns sum to 1, rows do not: 0 -> 1, 2; 1 -> 2; 2 -> 3; 3 -> 0.
UNEVEN = [[0.5, 0, 0, 0.5], [0.25, 0.5, 0, 0], [0.25, 0.5, 0.5, 0], [0, 0, 0.5, 0.5]]


def test_a_matrix_is_taken_as_it_is() -> None:
    graphs = FromMatrix(UNEVEN).for_size(4)
    check_graphs(graphs)
    assert np.array_equal(graphs.mixing_matrix(7), UNEVEN)
    assert graphs.peers(0, 0) == Peers(((1, 0.25), (2, 0.25)), ((3, 0.5),), 0.5)
    assert (graphs.stochasticity, graphs.period_steps) == ("column", 1)


def test_matrices_take_turns() -> None:
    there, back = [[0.5, 0], [0.5, 1]], [[1, 0.25], [0, 0.75]]
    graphs = FromMatrix([there, back]).for_size(2)
    assert graphs.period_steps == 2
    for step in range(6):
        assert np.array_equal(graphs.mixing_matrix(step), [there, back][step % 2])
    assert np.allclose(graphs.mixing_product(3), np.array(there) @ np.array(back) @ np.array(there))
    # Eigenvalues of a product of column-stochastic 2 x 2 matrices: 1 and the determinant, 0.5 * 0.75; two steps.
    assert graphs.spectral_gap == pytest.approx(1 - 0.375**0.5)


def test_the_matrix_may_change_after_it_was_given() -> None:
    matrix = np.array(UNEVEN)
    topology = FromMatrix(matrix)
    matrix[:] = 0
    assert np.array_equal(topology.for_size(4).mixing_matrix(), UNEVEN)


def test_float32_shares_are_made_to_sum_to_1() -> None:
    matrix = np.full((3, 3), 1 / 3, np.float32)
    found = FromMatrix(matrix).for_size(3).mixing_matrix()
    assert np.abs(found.sum(axis=0) - 1).max() < 1e-15


@pytest.mark.parametrize(
    ("matrix", "reason"),
    [
        (np.ones((2, 3)) / 2, r"shape \(n, n\).*got shape \(2, 3\)"),
        (np.ones(4), r"got shape \(4,\)"),
        ([np.eye(2), np.eye(3)], "all of the same shape"),
        ([["a", "b"], ["c", "d"]], "must be numbers"),
        ([[0.5, np.nan], [0.5, 0.5]], r"P\[0, 1\] = nan"),
        ([[1.1, 0.5], [-0.1, 0.5]], r"P\[1, 0\] = -0.1.*>= 0"),
        (np.array(UNEVEN).T, r"not column-stochastic: column 1, .*sums to 0.75.*its rows do: give the transpose"),
        ([[0.5, 0.5], [0.4, 0.5]], r"column 0, the shares that rank 0 sends and keeps, sums to 0.9, expected 1"),
        ([[0.0, 0.5], [1.0, 0.5]], r"P\[0, 0\] = 0: rank 0 must keep"),
        ([np.full((2, 2), 0.5), [[0.5, 0.5], [0.4, 0.5]]], "the mixing matrix of step 1 is not column-stochastic"),
        (np.eye(2), "disconnected: nothing of rank 0 ever reaches rank 1"),
        ([[1, 0.5], [0, 0.5]], "disconnected: nothing of rank 0 ever reaches rank 1"),
        ([[0.5, 0], [0.5, 1]], "disconnected: nothing of rank 1 ever reaches rank 0"),
        ([np.kron(np.eye(2), np.full((2, 2), 0.5))] * 2, "reaches rank 2, not over all 2 steps of its period"),
    ],
)
def test_matrix_refused_with_the_reason(matrix: object, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        FromMatrix(matrix)  # type: ignore[arg-type]


def test_a_world_of_another_size_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="the mixing matrix is for 4 ranks, but the job has 5"):
        FromMatrix(UNEVEN).for_size(5)
    with pytest.raises(ConfigurationError, match="the graph is for 3 ranks, but the job has 2"):
        FromGraph(nx.cycle_graph(3)).for_size(2)


def test_a_digraph_gives_equal_shares_to_out_neighbours() -> None:
    graph = nx.DiGraph([(0, 1), (0, 2), (1, 2), (2, 3), (3, 0)])
    graphs = FromGraph(graph).for_size(4)
    check_graphs(graphs)
    third, half = 1 / 3, 1 / 2
    assert np.allclose(
        graphs.mixing_matrix(),
        [[third, 0, 0, half], [third, half, 0, 0], [third, half, half, 0], [0, 0, half, half]],
    )
    assert graphs.stochasticity == "column"


def test_an_undirected_graph_is_doubly_stochastic_however_irregular() -> None:
    graphs = FromGraph(nx.star_graph(4)).for_size(5)
    check_graphs(graphs)
    assert graphs.stochasticity == "doubly"
    assert np.array_equal(graphs.mixing_matrix(), graphs.mixing_matrix().T)
    assert graphs.peers(1, 0).out_neighbors == ((0, 1 / 5),)  # 1 / (1 + the degree of the hub)


def test_shares_may_be_written_on_the_edges() -> None:
    graph = nx.DiGraph()
    graph.add_edge(0, 1, share=0.25)
    graph.add_edge(1, 0, share=0.5)
    assert np.array_equal(FromGraph(graph, share="share").for_size(2).mixing_matrix(), [[0.75, 0.5], [0.25, 0.5]])


def test_graphs_take_turns() -> None:
    graphs = FromGraph([nx.DiGraph([(0, 1), (1, 0), (2, 0)]), nx.DiGraph([(0, 2), (1, 2)])]).for_size(3)
    check_graphs(graphs)
    assert [len(graphs.peers(1, step).out_neighbors) for step in range(3)] == [1, 1, 1]
    assert graphs.peers(2, 0).out_neighbors == ((0, 0.5),)
    assert graphs.peers(2, 1).out_neighbors == ()


def with_shares(*shares: object) -> nx.DiGraph:
    graph = nx.DiGraph([(0, 1), (0, 2), (1, 0), (2, 0)])
    for edge, share in zip([(0, 1), (0, 2)], shares, strict=True):
        graph.edges[edge]["share"] = share
    graph.edges[1, 0]["share"] = graph.edges[2, 0]["share"] = 0.5
    return graph


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: FromGraph(nx.DiGraph([(0, 1), (1, 0), (1, 1)])), r"edge \(1, 1\) connects a rank with itself"),
        (lambda: FromGraph(nx.MultiDiGraph([(0, 1), (0, 1), (1, 0)])), r"edge \(0, 1\) is listed 2 times"),
        (lambda: FromGraph(nx.DiGraph([("a", "b"), ("b", "a")])), "nodes of a graph must be the ranks 0 to n - 1"),
        (lambda: FromGraph(nx.DiGraph([(1, 2), (2, 1)])), "nodes of a graph must be the ranks 0 to n - 1"),
        (lambda: FromGraph([nx.cycle_graph(3), nx.cycle_graph(4)]), r"equally many at each step \(3 in the first\)"),
        (lambda: FromGraph(nx.DiGraph()), "must be the ranks"),
        (lambda: FromGraph([]), "at least one graph"),
        (lambda: FromGraph(nx.path_graph(3, nx.DiGraph)), "nothing of rank 1 ever reaches rank 0"),
        (lambda: FromGraph(with_shares(0.5, 0.5), share="share"), "rank 0 sends shares that sum to 1"),
        (lambda: FromGraph(with_shares(0.5, 1.5), share="share"), r"edge \(0, 2\) has 'share' = 1.5"),
        (lambda: FromGraph(with_shares(0.5, None), share="share"), r"edge \(0, 2\) has 'share' = None"),
        (lambda: FromGraph(with_shares(0.5, 0.2), share="other"), r"edge \(0, 1\) has 'other' = None"),
    ],
)
def test_graph_refused_with_the_reason(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        make()


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(0, 2**32 - 1))
def test_any_strongly_connected_digraph_is_taken_and_any_other_refused(size: int, seed: int) -> None:
    graph = nx.gnp_random_graph(size, 0.35, seed=seed, directed=True)
    if nx.is_strongly_connected(graph):
        graphs = FromGraph(graph).for_size(size)
        check_graphs(graphs)
        assert {(j, i) for i, j in np.argwhere(graphs.mixing_matrix()) if i != j} == set(graph.edges)
    else:
        with pytest.raises(ConfigurationError, match="disconnected"):
            FromGraph(graph)


def test_stochasticity_by_name() -> None:
    assert stochasticity(np.array(UNEVEN)) == "column"
    assert stochasticity(np.array(UNEVEN).T) == "row"
    assert stochasticity(np.full((3, 3), 1 / 3)) == "doubly"
    assert stochasticity(np.ones((2, 2))) == "none"


class TwoRanks(GraphSequence):
    """Two ranks that swap halves, by default."""

    def __init__(self, **changed: Peers) -> None:
        super().__init__(2, 1)
        self.changed = changed

    def peers_in(self, rank: int, phase: int) -> Peers:
        half = ((1 - rank, 0.5),)
        return self.changed.get("ab"[rank], Peers(half, half, 0.5))


def test_check_graphs_accepts_a_right_implementation() -> None:
    check_graphs(TwoRanks())
    check_connected(TwoRanks())


@pytest.mark.parametrize(
    ("wrong", "reason"),
    [
        (Peers(((2, 0.5),), ((1, 0.5),), 0.5), "out-neighbour 2 does not exist"),
        (Peers(((1, 0.5),), ((-1, 0.5),), 0.5), "in-neighbour -1 does not exist"),
        (Peers(((0, 0.5),), ((1, 0.5),), 0.5), "out-neighbour is the rank itself"),
        (Peers(((1, 0.25), (1, 0.25)), ((1, 0.5),), 0.5), "out-neighbour 1 is listed 2 times"),
        (Peers(((1, 0.5),), ((1, 0.5),), 0.6), "shares must be positive and sum to 1"),
        (Peers(((1, 1.0),), ((1, 0.5),), 0.0), "shares must be positive"),
        (Peers(((1, -0.5),), ((1, 0.5),), 1.5), "shares must be positive"),
        (Peers((), ((1, 0.5),), 1.0), "rank 0 sends rank 1 nothing, which expects a share of 0.5"),
        (Peers(((1, 0.5),), (), 0.5), "rank 1 sends rank 0 a share of 0.5, which expects nothing"),
        (Peers(((1, 0.5),), ((1, 0.25),), 0.5), "a share of 0.5, which expects a share of 0.25"),
    ],
)
def test_check_graphs_rejects_wrong_implementations(wrong: Peers, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        check_graphs(TwoRanks(a=wrong))


def test_check_graphs_rejects_ranks_that_never_meet_and_graphs_that_do_not_exist() -> None:
    alone = Peers((), (), 1.0)
    with pytest.raises(ConfigurationError, match="disconnected"):
        check_graphs(TwoRanks(a=alone, b=alone))

    class Astray(TwoRanks):
        def phase(self, step: int) -> int:
            return step + 1

    with pytest.raises(ConfigurationError, match="there is no graph 1, expected 0 to 0"):
        check_graphs(Astray())
