"""Push-sum over simulated messages, by hand: what the graphs and the network together promise to gossip.

The algorithms of the library are not used here. A rank's state is its values and its push-sum weight in one array,
(x, w).
"""

import os
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import networkx as nx  # type: ignore[import-untyped]
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from lentando.comm.simulation import (
    Compute,
    Delay,
    Drop,
    Duplicate,
    Fault,
    Link,
    Network,
    SimulatedTransport,
    simulate,
)
from lentando.comm.topology import (
    BipartiteExponential,
    Complete,
    FromGraph,
    FromMatrix,
    GraphSequence,
    Hybrid,
    NodeAware,
    OnePeerExponential,
    PPeerExponential,
    Ring,
    StaticExponential,
    Topology,
    Torus,
)
from lentando.comm.transport import Request

CASES = int(os.environ.get("LENTANDO_GOSSIP_CASES", "200"))
"""How many random graphs, networks and delays each property is tried on."""

State = NDArray[np.float64]


def start(size: int) -> State:
    """Values 0 to n - 1 and their squares, and weight 1: shape (n, 3)."""
    ranks = np.arange(size, dtype=np.float64)
    return np.stack([ranks, ranks**2, np.ones(size)], axis=1)


def push_sum(graphs: GraphSequence, steps: int) -> Callable[[SimulatedTransport], State]:
    """x, w <- P x, P w, ``steps`` times, every rank with its neighbours only."""

    def worker(transport: SimulatedTransport) -> State:
        state: State = start(graphs.size)[transport.rank]
        for step in range(steps):
            transport.compute()
            peers = graphs.peers(transport.rank, step)
            received = [(peer, np.empty(3)) for peer, _ in peers.in_neighbors]
            transport.exchange([(peer, share * state) for peer, share in peers.out_neighbors], received).wait()
            state = peers.self_weight * state
            for _, array in received:
                state = state + array
        return state

    return worker


TOPOLOGIES: list[Topology] = [
    Ring(),
    Complete(),
    StaticExponential(),
    OnePeerExponential(),
    PPeerExponential(2),
    BipartiteExponential(),
    Torus(),
    NodeAware(OnePeerExponential(), 3),
    Hybrid(PPeerExponential(3), 2, Ring()),
]


@pytest.mark.parametrize("topology", TOPOLOGIES, ids=repr)
@pytest.mark.parametrize("size", [3, 6, 12])
def test_messages_do_what_the_matrices_say(topology: Topology, size: int) -> None:
    graphs = topology.for_size(size)
    compute = Compute(1.0, "exponential")  # the ranks are at different steps most of the time
    for steps in (1, 5):
        states = np.array(simulate(push_sum(graphs, steps), size, compute=compute))
        assert np.allclose(states, graphs.mixing_product(steps) @ start(size), rtol=1e-13)


@pytest.mark.slow
@pytest.mark.parametrize("size", [8, 1024])
def test_simulated_ranks_agree_exactly_after_log2_n_messages(size: int) -> None:
    """O42, by messages: integers halved log2 n times are exact in float64."""
    states = np.array(simulate(push_sum(OnePeerExponential().for_size(size), size.bit_length() - 1), size))
    assert (states == start(size).mean(axis=0)).all()


@pytest.mark.slow
@settings(max_examples=CASES, deadline=None)
@given(st.integers(1, 9), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_mass_is_conserved_on_any_sequence_of_digraphs(size: int, period: int, seed: int) -> None:
    """O39: sum x and sum w after every step, and w > 0."""
    graphs = FromMatrix(random_matrices(size, period, seed)).for_size(size)
    for steps in range(4):
        states = np.array(simulate(push_sum(graphs, steps), size, seed=seed))
        assert np.allclose(states.sum(axis=0), start(size).sum(axis=0), rtol=1e-13)
        assert states[:, -1].min() > 0


def random_matrices(size: int, period: int, seed: int) -> NDArray[np.float64]:
    """Column-stochastic, with positive diagonals, random edges and shares, and a cycle that connects all ranks."""
    random = np.random.default_rng(seed)
    matrices = random.random((period, size, size)) * (random.random((period, size, size)) < 0.4)
    matrices += np.eye(size) * (0.1 + random.random())
    order = random.permutation(size)
    matrices[0, order, np.roll(order, 1)] += 0.5
    shares: NDArray[np.float64] = matrices / matrices.sum(axis=1, keepdims=True)
    return shares


def test_debiased_values_reach_the_mean_on_an_irregular_digraph() -> None:
    """O40: z = x / w does, x does not."""
    graph = nx.gnp_random_graph(7, 0.3, seed=1, directed=True)
    assert nx.is_strongly_connected(graph)
    assert len({degree for _, degree in graph.out_degree}) > 1
    states = np.array(simulate(push_sum(FromGraph(graph).for_size(7), 400), 7))
    mean = start(7).mean(axis=0)[:2]
    assert np.abs(states[:, :2] / states[:, 2:] - mean).max() < 1e-12
    assert np.abs(states[:, 0] - mean[0]).max() > 0.5


def test_weights_stay_1_bit_identically_with_one_peer() -> None:
    """O41."""
    for size in (5, 8, 12):
        states = simulate(push_sum(OnePeerExponential().for_size(size), 23), size)
        assert all(state[2] == 1.0 for state in states)


def test_forgetting_the_weight_gives_a_wrong_mean() -> None:
    """O53: w set back to 1 after each step, on a graph whose rows do not sum to 1: 1.478 instead of 1.5."""
    matrix = np.transpose([[0.5, 0.25, 0.25, 0], [0, 0.5, 0.5, 0], [0, 0, 0.5, 0.5], [0.5, 0, 0, 0.5]])
    graphs = FromMatrix(matrix).for_size(4)

    def forgetful(transport: SimulatedTransport) -> float:
        value, weight = float(transport.rank), 1.0
        for step in range(200):
            peers = graphs.peers(transport.rank, step)
            received = [(peer, np.empty(2)) for peer, _ in peers.in_neighbors]
            state = np.array([value, weight])
            transport.exchange([(peer, share * state) for peer, share in peers.out_neighbors], received).wait()
            state = peers.self_weight * state + sum(array for _, array in received)
            value, weight = float(state[0] / state[1]), 1.0
        return value

    assert simulate(forgetful, 4) == [pytest.approx(1.4783, abs=5e-5)] * 4
    states = np.array(simulate(push_sum(graphs, 200), 4))
    assert np.allclose(states[:, 0] / states[:, 2], 1.5, rtol=1e-13)


@dataclass
class Ledger:
    """Where all mass is, known because all ranks are in one process.

    Attributes:
        held: by rank, its (x, w).
        flying: by (sender, step, receiver), what was sent and not yet added.
        before_drain: by rank, its (x, w) after its last step.
        lowest_weight: the least w that any rank has held.
        most_stale: the most steps between sending and adding.
        most_in_flight: the most messages that one rank waited for at a time.
    """

    held: dict[int, State] = field(default_factory=dict)
    flying: dict[tuple[int, int, int], State] = field(default_factory=dict)
    before_drain: dict[int, State] = field(default_factory=dict)
    lowest_weight: float = np.inf
    most_stale: int = 0
    most_in_flight: int = 0

    def total(self) -> State:
        return np.sum([*self.held.values(), *self.flying.values()], axis=0)  # type: ignore[no-any-return]


def overlapped(
    graphs: GraphSequence, steps: int, staleness: int, ledger: Ledger, *, eager: bool = True
) -> Callable[[SimulatedTransport], State]:
    """Push-sum whose messages arrive while the rank continues: added on arrival, at the latest ``staleness``
    steps after they were sent; ``eager=False`` adds them exactly then. What is in flight at the end is drained."""

    def worker(transport: SimulatedTransport) -> State:
        rank = transport.rank
        state: State = start(graphs.size)[rank]
        ledger.held[rank] = state
        pending: deque[tuple[int, Request, list[State]]] = deque()

        def add_oldest(now: int) -> None:
            nonlocal state
            expected_at, request, received = pending.popleft()
            request.wait()
            for message in received:
                sender, sent_at = int(message[3]), int(message[4])
                state = state + message[:3]
                del ledger.flying[sender, sent_at, rank]
            ledger.held[rank] = state
            ledger.most_stale = max(ledger.most_stale, now - expected_at)
            check_mass()

        def check_mass() -> None:
            ledger.lowest_weight = min(ledger.lowest_weight, float(state[2]))
            # With what is in flight, all mass has arrived, whatever step the other ranks have come to.
            if len(ledger.held) == graphs.size:
                assert np.allclose(ledger.total(), start(graphs.size).sum(axis=0), rtol=1e-12)

        for step in range(steps):
            transport.compute()
            peers = graphs.peers(rank, step)
            received = [np.empty(5) for _ in peers.in_neighbors]
            sends = [(peer, np.array([*(share * state), rank, step])) for peer, share in peers.out_neighbors]
            arrivals = [(peer, message) for (peer, _), message in zip(peers.in_neighbors, received, strict=True)]
            pending.append((step, transport.exchange(sends, arrivals), received))
            state = peers.self_weight * state
            ledger.held[rank] = state
            ledger.flying.update({(rank, step, peer): message[:3] for peer, message in sends})
            ledger.most_in_flight = max(ledger.most_in_flight, len(pending))
            check_mass()
            while pending and (step - pending[0][0] >= staleness or (eager and pending[0][1].test())):
                add_oldest(step)
        ledger.before_drain[rank] = state
        while pending:
            add_oldest(steps)
        return state

    return worker


@pytest.mark.slow
@settings(max_examples=CASES, deadline=None)
@given(
    st.integers(1, 7),
    st.integers(0, 4),
    st.floats(0, 10),
    st.booleans(),
    st.integers(0, 2**32 - 1),
)
def test_mass_in_flight_included_is_conserved_whatever_the_delays(
    size: int, staleness: int, jitter_seconds: float, reordering: bool, seed: int
) -> None:
    """O49 and the bound of O50: random graphs, delays of up to 10 steps, stragglers, overtaking messages."""
    graphs = FromMatrix(random_matrices(size, 2, seed)).for_size(size)
    ledger = Ledger()
    network = Network(0.1, 1e6, jitter_seconds, reordering=reordering)
    states = np.array(
        simulate(
            overlapped(graphs, 12, staleness, ledger),
            size,
            network=network,
            compute=Compute(1.0, "exponential", stragglers={0: 3.0}),
            seed=seed,
        )
    )
    assert np.allclose(states.sum(axis=0), start(size).sum(axis=0), rtol=1e-12)
    assert not ledger.flying
    assert ledger.lowest_weight > 0
    assert ledger.most_stale <= staleness
    assert ledger.most_in_flight <= staleness + 1


@pytest.mark.slow
@pytest.mark.parametrize("staleness", [1, 2, 5])
def test_late_messages_still_lead_to_the_mean_with_the_weight_and_not_without(staleness: int) -> None:
    """O49: delays up to the bound; without w, the error stays."""
    graphs = OnePeerExponential().for_size(8)
    ledger = Ledger()
    worker = overlapped(graphs, 300, staleness, ledger)
    network = Network(0.5, 1e9, 1.5 * staleness)
    states = np.array(simulate(worker, 8, network=network, compute=Compute(1.0, "exponential")))
    mean = start(8).mean(axis=0)[:2]
    assert np.abs(states[:, :2] / states[:, 2:] - mean).max() < 1e-10
    assert np.abs(states[:, :2] - mean).max() > 0.01
    assert ledger.most_in_flight == staleness + 1  # rounds did overlap


def test_no_staleness_is_synchronous_push_sum_bit_identically() -> None:
    """O50, of the mixing."""
    graphs = FromMatrix(random_matrices(6, 3, 1)).for_size(6)
    network, compute = Network(0.1, 1e6, 2.0), Compute(1.0, "exponential")
    synchronous = simulate(push_sum(graphs, 30), 6, network=network, compute=compute)
    overlapping = simulate(overlapped(graphs, 30, 0, Ledger()), 6, network=network, compute=compute)
    assert np.array_equal(overlapping, synchronous)


def test_adding_exactly_at_the_bound_does_not_depend_on_the_network() -> None:
    """What a deterministic overlap rests on."""
    graphs = OnePeerExponential().for_size(6)

    def run(seed: int, *, eager: bool) -> list[list[float]]:
        worker = overlapped(graphs, 20, 2, Ledger(), eager=eager)
        network = Network(0.1, 1e6, 3.0, links={(0, 1): Link(2.0, 1e6)})
        states = simulate(worker, 6, network=network, compute=Compute(1.0, "lognormal"), seed=seed)
        return [list(map(float, state)) for state in states]

    assert run(1, eager=False) == run(2, eager=False)
    assert run(1, eager=True) != run(2, eager=True)


def test_two_ranks_one_step_late_by_hand() -> None:
    """O51, of the mixing: x = 0 and 1, halves arrive one step later.

    Step 0 keeps (0, 1/2) and (1/2, 1/2) and sends the same. Step 1 keeps half of that and adds what came: rank 0 has
    0 + 1/2 and 1/4 + 1/2, rank 1 has 1/4 + 0 and 1/4 + 1/2. Step 2 keeps half of that and adds what step 1 sent.
    """
    graphs = OnePeerExponential().for_size(2)

    def run(steps: int) -> list[list[float]]:
        ledger = Ledger()
        simulate(overlapped(graphs, steps, 1, ledger, eager=False), 2)
        return [[float(value) for value in ledger.before_drain[rank][[0, 2]]] for rank in (0, 1)]

    assert run(1) == [[0, 1 / 2], [1 / 2, 1 / 2]]
    assert run(2) == [[1 / 2, 3 / 4], [1 / 4, 3 / 4]]
    assert run(3) == [[1 / 4 + 1 / 4, 3 / 8 + 1 / 4], [1 / 8 + 0, 3 / 8 + 1 / 4]]


def tolerant(steps: int, sent: list[State]) -> Callable[[SimulatedTransport], State]:
    """Push-sum round a directed ring that takes whatever arrives, as long as anything does, and never waits."""

    def worker(transport: SimulatedTransport) -> State:
        size, rank = transport.size, transport.rank
        state: State = start(size)[rank]
        received = np.empty(3)
        request = transport.exchange([], [((rank - 1) % size, received)])
        for step in range(steps + 5):
            if step < steps:
                share = state / 2
                transport.exchange([((rank + 1) % size, share)], [])
                if rank == 0:
                    sent.append(share)
                state = state - share
            transport.compute(1.0)
            while request.test():
                state = state + received
                request = transport.exchange([], [((rank - 1) % size, received)])
        return state

    return worker


@pytest.mark.parametrize(
    ("faults", "copies_of"),
    [
        ([], {}),
        ([Delay(1.5, nth=2)], {}),
        ([Drop(sender=0, nth=2)], {2: -1}),
        ([Duplicate(sender=0, nth=1)], {1: 1}),
        ([Drop(sender=0, nth=0), Duplicate(sender=0, nth=3)], {0: -1, 3: 1}),
    ],
    ids=str,
)
def test_lost_and_doubled_messages_change_the_mass_by_exactly_themselves(
    faults: list[Fault], copies_of: dict[int, int]
) -> None:
    """O52: so a sum over ranks detects them. A late message changes nothing."""
    sent: list[State] = []
    states = simulate(tolerant(6, sent), 4, network=Network(0.25, 1e9), faults=faults)
    expected = start(4).sum(axis=0)
    for number, copies in copies_of.items():
        expected = expected + copies * sent[number]
    assert np.allclose(np.sum(states, axis=0), expected, rtol=1e-14)
    assert bool(copies_of) == (not np.allclose(np.sum(states, axis=0), start(4).sum(axis=0), rtol=1e-6))
