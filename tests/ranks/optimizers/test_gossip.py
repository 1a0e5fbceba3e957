"""Gossip between replicas on every rank: push-sum's invariants (oracles O39 to O56), and the reference's results."""

import itertools
from collections.abc import Callable
from typing import Any

import networkx as nx
import numpy as np
import pytest
import reference
from case_selection import selected_cases
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker

from lentando.comm import world
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError, MismatchError
from lentando.comm.topology import (
    Complete,
    FromGraph,
    Hybrid,
    OnePeerExponential,
    PPeerExponential,
    Ring,
    StaticExponential,
    Topology,
)
from lentando.comm.transport import Array, Transport
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.push_sum import PushSum
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.optimizers.rules.wire import WireDtype

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
EXACT = {"rtol": 1e-11, "atol": 1e-11}
WIRE_DTYPES: dict[WireDtype, Any] = {"bfloat16": bfloat16, "float16": np.float16}


def irregular(size: int) -> Topology:
    """A strongly connected digraph in which rank 0 sends to all ranks and the others to one or two."""
    graph = nx.DiGraph()
    graph.add_nodes_from(range(size))
    graph.add_edges_from((0, rank) for rank in range(1, size))
    graph.add_edges_from((rank, (rank + 1) % size) for rank in range(1, size))
    graph.add_edges_from((rank, 0) for rank in range(2, size, 2))
    return FromGraph(graph)


TOPOLOGIES: dict[str, Callable[[int], Topology]] = {
    "one-peer exponential": lambda size: OnePeerExponential(),
    "static exponential": lambda size: StaticExponential(),
    "ring": lambda size: Ring(),
    "complete": lambda size: Complete(),
    "irregular": lambda size: irregular(size) if size > 1 else OnePeerExponential(),
}
NAMES = selected_cases(["one-peer exponential", "irregular"], [*TOPOLOGIES]) if world.size() == 2 else [*TOPOLOGIES]
"""With two ranks, all graphs are one."""


def worker(transport: Transport, base: Any, gradient: Any = QUADRATIC, rate: float = 0.1, **settings: Any) -> Worker:
    return Worker(transport, gradient, START, lambda step: rate, base=base, **settings)


def push_sum(of: Worker) -> PushSum:
    running = of.replica.base.steps
    assert isinstance(running, PushSum)
    return running


def expected(transport: Transport, topology: Topology, steps: int, staleness: int = 0, **options: Any) -> Any:
    graphs = topology.for_size(transport.size)
    return reference.push_sum_sgd(
        transport.size, steps, START, QUADRATIC, graphs.mixing_matrix, 0.1, staleness, **options
    )


def everyones(transport: Transport, array: Array) -> Array:
    return transport.allgather(np.ascontiguousarray(array))


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("staleness", [0, 1, 3])
def test_gossip_equals_the_reference(transport: Transport, name: str, staleness: int) -> None:
    """Column-stochastic mixing of x and w, gradients at z, late by ``staleness`` steps."""
    topology = TOPOLOGIES[name](transport.size)
    base = OSGP(topology, staleness, deterministic=True) if staleness else SGP(topology)
    mine = worker(transport, base)
    mine.run(14)
    outcome = expected(transport, topology, 14, staleness)
    assert_allclose(push_sum(mine).biased[0], outcome.x[transport.rank], **EXACT)
    assert_allclose(push_sum(mine).weight, outcome.w[transport.rank], **EXACT)
    assert_allclose(mine.model.x, outcome.x[transport.rank] / outcome.w[transport.rank], **EXACT)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("staleness", "wire_dtype"),
    selected_cases([(0, "bfloat16"), (2, "float16")], [*itertools.product([0, 2], WIRE_DTYPES)]),
)
def test_gossip_in_16_bits_equals_the_reference(
    transport: Transport, name: str, staleness: int, wire_dtype: WireDtype
) -> None:
    """To the precision of float64: the reference rounds the same messages, and keeps the same rests."""
    topology = TOPOLOGIES[name](transport.size)
    base = OSGP(topology, staleness, True, wire_dtype) if staleness else SGP(topology, wire_dtype)
    mine = worker(transport, base)
    mine.run(14)
    outcome = expected(transport, topology, 14, staleness, wire_dtype=WIRE_DTYPES[wire_dtype])
    assert_allclose(push_sum(mine).biased[0], outcome.x[transport.rank], **EXACT)
    assert_allclose(push_sum(mine).weight, outcome.w[transport.rank], **EXACT)
    if transport.size > 1:
        exact = expected(transport, topology, 14, staleness)
        assert np.abs(mine.model.x - exact.z[transport.rank]).max() > 1e-6  # it does round


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_dpsgd_in_16_bits_equals_the_reference(transport: Transport, wire_dtype: WireDtype) -> None:
    outcome = expected(transport, StaticExponential(), 14, wire_dtype=WIRE_DTYPES[wire_dtype])
    assert_allclose(
        worker(transport, DPSGD(StaticExponential(), wire_dtype)).run(14), outcome.x[transport.rank], **EXACT
    )


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
def test_exact_average_of_rounded_gossip_is_that_of_all_that_there_was(
    transport: Transport, wire_dtype: WireDtype
) -> None:
    """Errors of rounding are part of x, so that the average is that without rounding: gradients do not depend on z."""
    gradient = reference.constant(DIMENSION)
    rounded, exact = (
        worker(transport, OSGP(staleness=2, deterministic=True, wire_dtype=dtype), gradient, period=12)
        for dtype in (wire_dtype, None)
    )
    assert_allclose(rounded.run(12), exact.run(12), rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("name", NAMES)
def test_staleness_0_is_sgp_bit_identically(transport: Transport, name: str) -> None:
    """O50."""
    topology = TOPOLOGIES[name](transport.size)
    assert_array_equal(worker(transport, SGP(topology)).run(10), worker(transport, OSGP(topology, staleness=0)).run(10))


@pytest.mark.parametrize("staleness", [1, 5, *selected_cases([], [0, 2])])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("name", ["one-peer exponential", "irregular"])
def test_mass_is_conserved_and_weights_stay_positive(
    transport: Transport, name: str, staleness: int, deterministic: bool
) -> None:
    """O39 and O49: without gradients, the sums of x and w over ranks and messages in flight never change."""
    topology = TOPOLOGIES[name](transport.size)
    mine = worker(transport, OSGP(topology, staleness, deterministic), lambda *_: np.zeros(DIMENSION))
    mine.model.x += transport.rank  # before the first step: each replica starts elsewhere
    mine.replica.progress.has_started = True
    push_sum(mine).adopt_consensus()
    total = everyones(transport, mine.model.x).sum(axis=0)
    for _ in range(12):
        mine.run(1)
        running = push_sum(mine)
        assert running.weight > 0
        late = running.state_dict()["under_way"]
        x, w = running.biased[0].copy(), running.weight
        for pending in running.exchanges.in_flight:
            for message in pending.received:
                x += message.shares[0].read(slice(None))
                w += message.weight
        assert len(late) <= staleness
        assert_allclose(everyones(transport, x).sum(axis=0), total, rtol=1e-12, atol=1e-12)
        assert_allclose(everyones(transport, np.array([w])).sum(), transport.size, rtol=1e-13)


@pytest.mark.parametrize(
    ("name", "staleness"),
    selected_cases(
        [("one-peer exponential", 2), ("irregular", 0), ("ring", 2)],
        [*itertools.product(["one-peer exponential", "irregular", "ring"], [0, 2])],
    ),
)
def test_replicas_reach_the_mean_of_their_starts(transport: Transport, name: str, staleness: int) -> None:
    """O40 and O49: also on graphs where x itself does not, and through delays."""
    mine = worker(transport, OSGP(TOPOLOGIES[name](transport.size), staleness), lambda *_: np.zeros(DIMENSION))
    mine.model.x += transport.rank
    mine.replica.progress.has_started = True
    push_sum(mine).adopt_consensus()
    mine.run(min(60 * transport.size, 400))
    mine.replica.setup.wait_in_flight()
    assert_allclose(mine.model.x, START + (transport.size - 1) / 2, atol=1e-9)


def test_doubly_stochastic_gossip_keeps_every_weight_at_1_bit_identically(transport: Transport) -> None:
    """O41: for shares of one half; SGP is then D-PSGD."""
    pushed = worker(transport, SGP())
    for _ in range(10):
        pushed.run(1)
        assert push_sum(pushed).weight == 1.0
    assert_array_equal(pushed.model.x, worker(transport, DPSGD()).run(10))


@pytest.mark.parametrize("name", ["static exponential", "ring", "complete"])
def test_sgp_on_a_doubly_stochastic_graph_is_dpsgd(transport: Transport, name: str) -> None:
    """O41: to rounding, for other shares."""
    topology = TOPOLOGIES[name](transport.size)
    symmetric = worker(transport, DPSGD(topology))
    assert_allclose(worker(transport, SGP(topology)).run(10), symmetric.run(10), **EXACT)
    assert push_sum(symmetric).weight == 1.0


def test_dpsgd_refuses_a_graph_that_is_not_doubly_stochastic(transport: Transport) -> None:
    if transport.size < 3:
        return
    with pytest.raises(ConfigurationError, match="DPSGD needs doubly stochastic mixing matrices"):
        worker(transport, DPSGD(irregular(transport.size)))


def test_gradient_step_acts_on_x_with_the_plain_learning_rate(transport: Transport) -> None:
    """O48: the sum of x falls by exactly gamma times the sum of the gradients, whatever the weights."""
    topology = irregular(transport.size) if transport.size > 1 else Ring()
    mine = worker(transport, SGP(topology), lambda worker, *_: np.full(DIMENSION, worker + 1.0))
    mine.run(5)
    before = everyones(transport, push_sum(mine).biased[0]).sum(axis=0)
    mine.run(1)
    after = everyones(transport, push_sum(mine).biased[0]).sum(axis=0)
    assert_allclose(before - after, 0.1 * transport.size * (transport.size + 1) / 2, rtol=1e-10)


@pytest.mark.parametrize("staleness", [1, 2, 4])
def test_no_message_is_used_later_than_the_bound(transport: Transport, staleness: int) -> None:
    """O50: so many rounds are in flight at the most, and each is used by then."""
    mine = worker(transport, OSGP(staleness=staleness))
    for step in range(12):
        mine.run(1)
        numbers = [pending.step for pending in push_sum(mine).exchanges.in_flight]
        assert all(step - number < staleness for number in numbers)


def test_one_step_overlap_between_two_ranks_by_hand(transport: Transport) -> None:
    """O51: x = 0 and 8, no gradients, shares of one half. Kept: 0, 4 (w 1/2 each); in flight: 0 to rank 1, 4 to rank 0.
    Step 2: x + arrived = 4, 4 (w 1); kept 2, 2. Step 3: 4, 4 again; z has been 0, 8 - then 4, 4 permanently.
    """
    if transport.size != 2:
        return
    mine = worker(transport, OSGP(staleness=1, deterministic=True), lambda *_: np.zeros(DIMENSION))
    mine.model.x[:] = 8.0 * transport.rank
    mine.replica.progress.has_started = True
    push_sum(mine).adopt_consensus()
    for x, w, z in [([0.0, 4.0], 0.5, [0.0, 8.0]), ([2.0, 2.0], 0.5, [4.0, 4.0]), ([2.0, 2.0], 0.5, [4.0, 4.0])]:
        mine.run(1)
        assert_array_equal(push_sum(mine).biased[0], x[transport.rank])
        assert push_sum(mine).weight == w
        assert_array_equal(mine.model.x, z[transport.rank])


def test_fewer_peers_in_the_middle_of_a_run_keep_the_weights(transport: Transport) -> None:
    """O54: from two peers to one; the weights still sum to the number of ranks."""
    hybrid = Hybrid(PPeerExponential(2), 5, OnePeerExponential())
    mine = worker(transport, SGP(hybrid))
    mine.run(12)
    assert_allclose(everyones(transport, np.array([push_sum(mine).weight])).sum(), transport.size, rtol=1e-13)
    assert_allclose(mine.model.x, expected(transport, hybrid, 12).z[transport.rank], **EXACT)


def test_debiasing_and_back_returns_the_same_x(transport: Transport) -> None:
    """O55, bit-identically: a step that does not move the model does not move x."""
    topology = irregular(transport.size) if transport.size > 1 else Ring()
    mine = worker(transport, SGP(topology))
    mine.run(7)
    before = push_sum(mine).biased[0].copy()
    push_sum(mine)._mix(moved=True, show=True)
    assert_array_equal(push_sum(mine).biased[0], before)


@pytest.mark.parametrize("base", [SGP(), DPSGD(), OSGP(deterministic=True)])
def test_equal_replicas_on_equal_data_train_like_one(transport: Transport, base: Any) -> None:
    """O56."""
    mine = worker(transport, base, lambda _, step, x: QUADRATIC(0, step, x))
    assert_allclose(mine.run(12), reference.synchronous_sgd(1, 12, START, QUADRATIC, 0.1), **EXACT)


@pytest.mark.parametrize("base", [SGP(), DPSGD(), OSGP(deterministic=True), OSGP(staleness=2, deterministic=True)])
def test_slowmo_over_gossip_equals_the_reference(transport: Transport, base: Any) -> None:
    """What is in flight is received before the exact average, and w is 1 after it."""
    mine = worker(transport, base, outer=SlowMomentum(0.9, 0.6), period=4)
    for _ in range(3):
        everyone = everyones(transport, mine.run(4))
        assert (everyone == everyone[0]).all()
        assert push_sum(mine).weight == 1.0
        assert not push_sum(mine).exchanges.in_flight
    mine.run(2)
    staleness = getattr(base, "staleness", 0)
    outcome = expected(transport, base.topology, 14, staleness, period=4, alpha=0.9, beta=0.6)
    assert_allclose(mine.model.x, outcome.z[transport.rank], **EXACT)


def test_exact_average_weighs_by_mass(transport: Transport) -> None:
    """On an irregular graph: the mean of x, which is the mean that push-sum converges to, not the mean of z."""
    if transport.size < 3:
        return
    mine = worker(transport, SGP(irregular(transport.size)), period=5)
    mine.run(4)
    with mine.replica.averaged():
        shown = mine.model.x.copy()
    mean = everyones(transport, push_sum(mine).biased[0]).mean(axis=0)
    assert_allclose(shown, mean, **EXACT)
    assert np.abs(shown - everyones(transport, mine.model.x).mean(axis=0)).max() > 1e-6


def test_averaged_restores_what_gossip_holds(transport: Transport) -> None:
    mine, undisturbed = (worker(transport, SGP(StaticExponential())) for _ in range(2))
    mine.run(5)
    with mine.replica.averaged():
        everyone = everyones(transport, mine.model.x)
        assert (everyone == everyone[0]).all()
    assert_array_equal(mine.run(5), undisturbed.run(10))


def test_slow_momentum_without_average_keeps_gossip_going(transport: Transport) -> None:
    """SlowMo's no-average variant: each replica steps outward automatically; mass is what the parameters then are."""
    mine = worker(transport, SGP(), outer=SlowMomentum(1.0, 0.6), period=4, exact_average=False)
    x = mine.run(12)
    outcome = expected(transport, OnePeerExponential(), 12, period=4, beta=0.6, exact_average=False)
    assert_allclose(x, outcome.z[transport.rank], **EXACT)


@pytest.mark.parametrize("taken", selected_cases([3, 4, 6], [*range(9)]))
@pytest.mark.parametrize(
    "base",
    [
        SGP(StaticExponential()),
        OSGP(Ring(), staleness=2, deterministic=True),
        OSGP(Ring(), staleness=2, deterministic=True, wire_dtype="bfloat16"),
        OSGP(staleness=1, deterministic=True, wire_dtype="float16"),
    ],
)
def test_resuming_with_messages_in_flight_is_the_same_bit_identically(
    transport: Transport, base: Any, taken: int
) -> None:
    """O52: what is in flight is saved as mass, neither lost nor doubled."""
    import copy

    straight = worker(transport, base, outer=SlowMomentum(1.0, 0.5), period=4)
    straight.run(taken)
    state, x = copy.deepcopy(straight.replica.state_dict()), straight.model.x.copy()
    transport.barrier()
    straight.run(9)
    resumed = worker(transport, base, outer=SlowMomentum(1.0, 0.5), period=4)
    resumed.model.x[:] = x
    resumed.replica.load_state_dict(state)
    assert_array_equal(resumed.run(9), straight.model.x)
    assert_array_equal(push_sum(resumed).biased[0], push_sum(straight).biased[0])


def test_consensus_distance_is_the_spread_of_the_replicas(transport: Transport) -> None:
    mine = worker(transport, SGP())
    mine.run(3)
    everyone = everyones(transport, mine.model.x)
    wanted = np.sqrt(((everyone - everyone.mean(axis=0)) ** 2).sum(axis=1).mean())
    assert mine.replica.consensus_distance() == pytest.approx(wanted)


def test_consensus_distance_of_equal_replicas_is_zero(transport: Transport) -> None:
    """Also where the mean of equal numbers is rounded, as it is for three ranks."""
    mine = worker(transport, SGP())
    for scale in (0.1, 0.7, 1 / 3):
        mine.model.x[...] = np.linspace(-scale, scale, mine.model.x.size)
        assert mine.replica.consensus_distance() == 0


@pytest.mark.parametrize("bad", [-1, 1.0, True, None])
def test_impossible_staleness_is_refused(bad: Any) -> None:
    with pytest.raises(ConfigurationError, match="staleness must be an integer >= 0"):
        OSGP(staleness=bad)


def test_one_gossip_step_is_one_message_per_peer_of_the_parameters_size(transport: Transport) -> None:
    mine = worker(transport, SGP())
    mine.run(1)
    before = transport.traffic.copy()
    mine.run(1)
    peers = OnePeerExponential().for_size(transport.size).peers(transport.rank, 1).out_neighbors
    assert transport.traffic.messages - before.messages == len(peers) == (transport.size > 1)
    assert transport.traffic.bytes_sent - before.bytes_sent == len(peers) * (8 * DIMENSION + 16)
    assert transport.traffic.collectives == before.collectives


@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16])
def test_messages_in_16_bits_carry_two_bytes_a_parameter(
    transport: Transport, wire_dtype: WireDtype, dtype: Any
) -> None:
    mine = Worker(transport, QUADRATIC, START.astype(dtype), lambda step: 0.1, base=SGP(wire_dtype=wire_dtype))
    mine.run(3)
    peers = transport.size > 1
    assert report_of(mine.replica)["bytes_sent"] == 3 * peers * (2 * DIMENSION + 16)


def test_ranks_that_round_differently_are_reported(transport: Transport) -> None:
    if transport.size == 1:
        return
    with pytest.raises(MismatchError, match=r"settings differ .*base.wire_dtype: .*None.*'bfloat16'"):
        worker(transport, SGP(wire_dtype=None if transport.rank == 0 else "bfloat16"))
