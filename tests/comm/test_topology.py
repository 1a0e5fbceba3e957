"""The graphs themselves: what the papers prove of them, at any world size, in integers."""

import subprocess
import sys
from math import cos, pi, sin
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from lentando.comm.errors import ConfigurationError
from lentando.comm.topology import (
    BipartiteExponential,
    Circulant,
    Complete,
    FromMatrix,
    GraphSequence,
    Hybrid,
    Hypercube,
    NodeAware,
    OnePeerExponential,
    OnePeerHypercube,
    PPeerExponential,
    Ring,
    StaticExponential,
    Topology,
    Torus,
    check_graphs,
    second_modulus,
)

ANY_SIZE: list[Topology] = [
    Ring(),
    Complete(),
    StaticExponential(),
    OnePeerExponential(),
    PPeerExponential(1),
    PPeerExponential(2),
    PPeerExponential(3),
    BipartiteExponential(),
    Torus(),
    Hybrid(PPeerExponential(2), 5, OnePeerExponential()),
]
SIZES = [*range(1, 34), 63, 64, 65]


def averaging(size: int) -> NDArray[np.float64]:
    """J: every entry 1/n."""
    return np.full((size, size), 1 / size)


@pytest.mark.parametrize("topology", ANY_SIZE, ids=repr)
def test_holds_together_and_is_doubly_stochastic_at_any_size(topology: Topology) -> None:
    for size in SIZES:
        graphs = topology.for_size(size)
        check_graphs(graphs)
        assert graphs.size == size
        assert graphs.stochasticity == "doubly"  # O41


@pytest.mark.parametrize("topology", [Hypercube(), OnePeerHypercube()], ids=repr)
def test_hypercubes_hold_together_at_powers_of_two(topology: Topology) -> None:
    for size in (1, 2, 4, 8, 64):
        check_graphs(topology.for_size(size))
        assert topology.for_size(size).stochasticity == "doubly"


@pytest.mark.parametrize("topology", ANY_SIZE, ids=repr)
def test_repeats_after_its_period_and_not_earlier_in_the_lead(topology: Topology) -> None:
    for size in (1, 2, 6, 8):
        graphs = topology.for_size(size)
        for step in range(graphs.lead_steps, graphs.lead_steps + 2 * graphs.period_steps):
            for rank in range(size):
                assert graphs.peers(rank, step) == graphs.peers(rank, step + graphs.period_steps)
                assert graphs.peers(rank, step) == graphs.peers(rank, step + 1_000 * graphs.period_steps)


def test_one_peer_exponential_is_a_permutation_with_ceil_log2_hops() -> None:
    """O47."""
    for size in range(2, 130):
        graphs = OnePeerExponential().for_size(size)
        assert graphs.period_steps == next(k for k in range(10) if 2**k >= size)
        for step in range(graphs.period_steps):
            sent = [graphs.peers(rank, step).out_neighbors for rank in range(size)]
            assert all(len(neighbors) == 1 for neighbors in sent)
            receivers = [neighbors[0][0] for neighbors in sent]
            assert sorted(receivers) == list(range(size))
            assert receivers == [(rank + 2**step) % size for rank in range(size)]


def test_hops_are_counted_in_integers() -> None:
    """O47: floating-point logarithms lose the last digit at 3^5 + 1 ranks, and small tables do not reach 2^29 + 1."""
    assert PPeerExponential(2).for_size(243).period_steps == 5
    assert PPeerExponential(2).for_size(244).period_steps == 6
    size = 2**29 + 1
    graphs = OnePeerExponential().for_size(size)
    assert graphs.period_steps == 30
    assert graphs.peers(size - 1, 29).out_neighbors == ((2**29 - 1, 0.5),)


@pytest.mark.parametrize(("size", "peers", "step", "hops"), [(6, 2, 1, [3]), (2, 2, 0, [1]), (3, 3, 0, [1, 2])])
def test_p_peer_hops_that_coincide_or_return_are_left_out(size: int, peers: int, step: int, hops: list[int]) -> None:
    found = PPeerExponential(peers).for_size(size).peers(0, step)
    assert found.out_neighbors == tuple((hop, 1 / (len(hops) + 1)) for hop in hops)
    assert found.self_weight == 1 / (len(hops) + 1)


@pytest.mark.parametrize(
    "topology",
    [OnePeerExponential(), OnePeerHypercube(), Circulant([[4], [-1], [2]])],
    ids=lambda topology: type(topology).__name__,
)
def test_one_peer_averages_exactly_in_log2_n_steps_from_any_phase(topology: Topology) -> None:
    """O42: any K consecutive steps, any order and sign of the hops; exact bit-identically, and not a step earlier."""
    sizes = (8,) if isinstance(topology, Circulant) else (1, 2, 4, 8, 32, 256)
    for size in sizes:
        graphs = topology.for_size(size)
        steps = size.bit_length() - 1
        for phase in range(graphs.period_steps):
            assert np.array_equal(graphs.mixing_product(steps, phase), averaging(size))
            assert size == 1 or not np.allclose(graphs.mixing_product(steps - 1, phase), averaging(size))


# Section 4.1 of the notes on exponential graphs, and the closed form of the module.
@pytest.mark.parametrize(("size", "norm"), [(3, 0.25), (5, 0.202), (6, 0.2165), (7, 0.125), (12, 0.2091)])
def test_one_peer_exponential_is_not_exact_elsewhere(size: int, norm: float) -> None:
    """O43."""
    graphs = OnePeerExponential().for_size(size)
    steps = graphs.period_steps
    found = np.linalg.norm(graphs.mixing_product(steps) - averaging(size), 2)
    closed = max(abs(sin(2**steps * pi * m / size) / (2**steps * sin(pi * m / size))) for m in range(1, size))
    assert found == pytest.approx(norm, abs=5e-4)
    assert found == pytest.approx(closed, rel=1e-12)
    assert graphs.spectral_gap == pytest.approx(1 - closed ** (1 / steps), rel=1e-12)
    # It contracts geometrically: each further period by the same factor (the matrices are normal and commute).
    twice = np.linalg.norm(graphs.mixing_product(2 * steps) - averaging(size), 2)
    assert twice == pytest.approx(closed**2, rel=1e-9)


@pytest.mark.parametrize(("peers", "digits"), [(1, 4), (2, 1), (2, 3), (3, 2), (4, 2)])
def test_p_peer_exponential_is_exact_in_k_steps_at_powers_of_its_base(peers: int, digits: int) -> None:
    """O44."""
    size = (peers + 1) ** digits
    graphs = PPeerExponential(peers).for_size(size)
    assert graphs.period_steps == digits
    for phase in range(digits):
        assert np.allclose(graphs.mixing_product(digits, phase), averaging(size), rtol=0, atol=1e-15)
    assert graphs.spectral_gap == 1
    assert not np.allclose(graphs.mixing_product(digits - 1), averaging(size))


@pytest.mark.parametrize("log2_size", [2, 3, 4, 5])
def test_alternating_directions_are_exact_only_after_almost_twice_as_many_steps(log2_size: int) -> None:
    """O45: the order +1, -1, +2, -2, +4, ... of the published SGP scripts."""
    size = 2**log2_size
    graphs = Circulant([[sign * 2**power] for power in range(log2_size) for sign in (1, -1)][:-1]).for_size(size)
    needed = 2 * log2_size - 1
    assert np.array_equal(graphs.mixing_product(needed), averaging(size))
    for steps in range(needed):
        assert not np.allclose(graphs.mixing_product(steps), averaging(size))


@pytest.mark.parametrize("size", [2, 4, 6, 12, 32, 34, 64, 100, 256])
def test_static_exponential_contracts_as_proven_for_even_sizes(size: int) -> None:
    """O46."""
    graphs = StaticExponential().for_size(size)
    rho = 1 - 2 / (1 + (size - 1).bit_length())
    assert 1 - graphs.spectral_gap == pytest.approx(rho, abs=1e-12)
    assert np.linalg.norm(graphs.mixing_matrix() - averaging(size), 2) == pytest.approx(rho, abs=1e-12)


@pytest.mark.parametrize(("size", "rho"), [(33, 0.6078), (65, 0.648)])
def test_static_exponential_contracts_faster_at_odd_sizes(size: int, rho: float) -> None:
    found = 1 - StaticExponential().for_size(size).spectral_gap
    assert found == pytest.approx(rho, abs=5e-4)
    assert found < 1 - 2 / (1 + (size - 1).bit_length()) - 0.05


def test_one_peer_keeps_push_sum_weights_at_1_bit_identically() -> None:
    """O41: halves are exact in binary; six sixths are not."""
    for size in (3, 8, 33):
        graphs = OnePeerExponential().for_size(size)
        assert np.array_equal(graphs.mixing_product(50) @ np.ones(size), np.ones(size))
    sixths = StaticExponential().for_size(32)
    assert np.allclose(sixths.mixing_product(50) @ np.ones(32), 1, rtol=0, atol=1e-13)


def test_random_peers_mix_worse_than_the_exponential_cycle() -> None:
    """O57: 32 ranks, 5 steps: |lambda_2| is 0 when cycling, about 0.2 for uniformly random peers, 0.35 for random
    hops.
    """
    random = np.random.default_rng(5)
    size, steps = 32, 5
    assert second_modulus(OnePeerExponential().for_size(size).mixing_product(steps)) == 0

    def mean_modulus(hops: list[int]) -> float:
        moduli = []
        for _ in range(60):
            product = np.eye(size)
            for _ in range(steps):
                matrix = np.eye(size) / 2
                for rank in range(size):
                    matrix[(rank + random.choice(hops)) % size, rank] += 0.5
                product = matrix @ product
            moduli.append(second_modulus(product))
        return float(np.mean(moduli))

    assert mean_modulus(list(range(1, size))) == pytest.approx(0.20, abs=0.03)
    assert mean_modulus([1, 2, 4, 8, 16]) == pytest.approx(0.36, abs=0.05)


@pytest.mark.parametrize("size", [3, 5, 8, 12, 33])
def test_ring_torus_and_hypercube_contract_by_their_closed_forms(size: int) -> None:
    assert 1 - Ring().for_size(size).spectral_gap == pytest.approx((1 + 2 * cos(2 * pi / size)) / 3, abs=1e-12)
    assert Complete().for_size(size).spectral_gap == 1
    assert Torus(1).for_size(size).spectral_gap == pytest.approx(Ring().for_size(size).spectral_gap, abs=1e-12)
    if size % 3 == 0 and size > 9:
        columns = size // 3
        rho = max((1 + 2 * cos(2 * pi / 3) + 2) / 5, (1 + 2 + 2 * cos(2 * pi / columns)) / 5)
        assert 1 - Torus(3).for_size(size).spectral_gap == pytest.approx(rho, abs=1e-12)
    if size == 8:
        assert 1 - Hypercube().for_size(size).spectral_gap == pytest.approx(1 - 2 / (1 + 3), abs=1e-12)


@pytest.mark.parametrize("size", [8, 32, 256])
def test_an_average_that_is_exact_after_two_periods_has_the_whole_gap(size: int) -> None:
    """The product of one period is nilpotent on disagreement but not 0: solvers give a root of the rounding error."""
    graphs = BipartiteExponential().for_size(size)
    assert not np.allclose(graphs.mixing_product(graphs.period_steps), averaging(size))
    assert np.array_equal(graphs.mixing_product(2 * graphs.period_steps), averaging(size))
    assert graphs.spectral_gap == 1


def test_torus_is_as_square_as_the_size_allows() -> None:
    def neighbors(size: int, rank: int) -> set[int]:
        return {neighbor for neighbor, _ in Torus().for_size(size).peers(rank, 0).out_neighbors}

    assert neighbors(12, 5) == {1, 9, 4, 6}  # 3 rows of 4
    assert neighbors(16, 0) == {4, 12, 1, 3}
    assert neighbors(7, 0) == {1, 6}  # a prime: a ring
    assert neighbors(4, 0) == {1, 2}  # both ways round lead to the same rank: one edge
    assert Torus().for_size(4).peers(0, 0).self_weight == 1 / 3


def test_bipartite_pairs_even_with_odd_ranks_and_one_rests_if_the_size_is_odd() -> None:
    for size in (2, 3, 8, 9, 12, 33):
        graphs = BipartiteExponential().for_size(size)
        for step in range(graphs.period_steps):
            resting = 0
            for rank in range(size):
                peers = graphs.peers(rank, step)
                assert peers.out_neighbors == peers.in_neighbors
                if not peers.out_neighbors:
                    assert peers.self_weight == 1
                    resting += 1
                    continue
                ((other, share),) = peers.out_neighbors
                assert (other - rank) % 2 == 1
                assert share == peers.self_weight == 0.5
            assert resting == size % 2
    hops = [BipartiteExponential().for_size(32).peers(0, step).out_neighbors[0][0] for step in range(5)]
    assert hops == [1, 3, 5, 9, 17]


def test_hybrid_changes_at_its_step_and_rederives_the_shares() -> None:
    """The graph's part of O54: 2 peers for 3 steps, then 1; every step's columns sum to 1."""
    graphs = Hybrid(PPeerExponential(2), 3, OnePeerExponential()).for_size(9)
    two, one = PPeerExponential(2).for_size(9), OnePeerExponential().for_size(9)
    for step in range(20):
        expected = two.peers(4, step) if step < 3 else one.peers(4, step - 3)
        assert graphs.peers(4, step) == expected
        assert np.allclose(graphs.mixing_matrix(step).sum(axis=0), 1)
    assert (graphs.lead_steps, graphs.period_steps, graphs.phases) == (3, 4, 2 + 4)
    assert graphs.spectral_gap == one.spectral_gap


def test_hybrids_nest() -> None:
    graphs = Hybrid(Complete(), 2, Hybrid(Ring(), 3, OnePeerExponential())).for_size(8)
    check_graphs(graphs)
    degrees = [len(graphs.peers(0, step).out_neighbors) for step in range(8)]
    assert degrees == [7, 7, 2, 2, 2, 1, 1, 1]


@pytest.mark.parametrize("leaders", [1, 2, 3])
def test_node_aware_averages_in_nodes_and_gossips_between_leaders(leaders: int) -> None:
    nodes, local_size = 4, 3
    inner = OnePeerExponential().for_size(nodes)
    graphs = NodeAware(OnePeerExponential(), local_size, leaders).for_size(nodes * local_size)
    check_graphs(graphs)
    within = np.kron(np.eye(nodes), averaging(local_size))
    node_means = np.kron(np.eye(nodes), np.full((1, local_size), 1 / local_size))
    values = np.random.default_rng(0).normal(size=nodes * local_size)
    for step in range(0, 2 * graphs.period_steps, 2):
        assert np.allclose(graphs.mixing_matrix(step), within)
        gossip = graphs.mixing_matrix(step + 1)
        crossing = {
            (i % local_size, j % local_size) for i, j in np.argwhere(gossip) if i // local_size != j // local_size
        }
        assert crossing == {(local, local) for local in range(leaders)}
        # What two steps do to the means of the nodes, as documented.
        before = node_means @ values
        values = gossip @ within @ values
        slowed = np.eye(nodes) + leaders / local_size * (inner.mixing_matrix(step // 2) - np.eye(nodes))
        assert np.allclose(node_means @ values, slowed @ before)
    if leaders == local_size:
        assert np.allclose(graphs.mixing_product(4), averaging(12))


def test_node_aware_with_nodes_of_one_is_its_inner_topology() -> None:
    assert NodeAware(Ring(), 1).for_size(6) is Ring().for_size(6)


def test_one_rank_has_no_neighbours() -> None:
    for topology in [*ANY_SIZE, Hypercube(), OnePeerHypercube(), NodeAware(Ring(), 1)]:
        graphs = topology.for_size(1)
        for step in range(7):
            peers = graphs.peers(0, step)
            assert (peers.out_neighbors, peers.in_neighbors, peers.self_weight) == ((), (), 1.0)
        assert graphs.spectral_gap == 1


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Ring().for_size(0), "at least 1 rank"),
        (lambda: Hypercube().for_size(12), "power of 2 as number of ranks, got 12"),
        (lambda: OnePeerHypercube().for_size(3), "power of 2"),
        (lambda: Torus(5).for_size(12), "multiple of 5 ranks, got 12"),
        (lambda: PPeerExponential(0), "peers must be an integer >= 1"),
        (lambda: Hybrid(Ring(), -1, Ring()), "steps must be an integer >= 0"),
        (lambda: NodeAware(Ring(), 4).for_size(6), "6 ranks, no multiple of local_size=4"),
        (lambda: NodeAware(Ring(), 2, 3), "leaders must be between 1 and local_size"),
        (lambda: Circulant([]), "at least one step"),
        (lambda: Circulant([[1, 5]]).for_size(4), "out-neighbour 1 is listed 2 times"),
        (lambda: Circulant([[1, 4]]).for_size(4), "is the rank itself"),
        (lambda: Circulant([[2]]).for_size(4), "nothing of rank 0 ever reaches rank 1"),
        (lambda: Circulant([[2], [4]]).for_size(6), "all 2 steps of its period"),
    ],
)
def test_refused_with_the_reason(make: object, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        make()  # type: ignore[operator]


def test_is_planned_once_for_equal_descriptions() -> None:
    assert PPeerExponential(2).for_size(27) is PPeerExponential(2).for_size(27)
    assert PPeerExponential(2).for_size(27) is not PPeerExponential(3).for_size(27)


def test_says_what_it_is() -> None:
    assert str(OnePeerExponential().for_size(8)) == (
        "OnePeerExponential among 8 ranks: 3 graphs, doubly stochastic, spectral gap 1 per step"
    )
    uneven = FromMatrix([[0.5, 0.25], [0.5, 0.75]]).for_size(2)
    assert str(uneven) == "FromMatrix among 2 ranks: 1 graph, column stochastic, spectral gap 0.75 per step"


@pytest.mark.parametrize(
    "graphs", [OnePeerExponential().for_size(12), Ring().for_size(1), Complete().for_size(5)], ids=str
)
def test_picture_shows_every_message(graphs: GraphSequence, tmp_path: Path) -> None:
    figure = graphs.draw(tmp_path / "graph.png")
    assert (tmp_path / "graph.png").read_bytes().startswith(b"\x89PNG")
    panels = [panel for panel in figure.axes if panel.get_title()]
    assert len(panels) == graphs.period_steps
    for step, panel in enumerate(panels):
        labels = [text for text in panel.texts if text.get_text()]
        messages = sum(len(graphs.peers(rank, step).out_neighbors) for rank in range(graphs.size))
        assert len(labels) == graphs.size
        assert len(panel.texts) - len(labels) == messages


def test_loads_neither_matplotlib_nor_networkx() -> None:
    program = "import sys, lentando.comm.topology; print({'matplotlib', 'networkx', 'greenlet'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=120)
    assert found.stdout.strip() == "set()"
