"""Gossip replicas on simulated networks: whatever the graph, the delays and the staleness, no mass is lost."""

import os
from typing import Any

import networkx as nx
import numpy as np
import pytest
from case_selection import selected_cases
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy_model import Worker

from lentando.comm.errors import DeadlockError, MismatchError, SimulationError
from lentando.comm.simulation import Compute, Drop, Duplicate, Network, simulate
from lentando.comm.topology import FromGraph, OnePeerExponential, PPeerExponential, Topology
from lentando.comm.transport import Transport
from lentando.optimizers.rules.gossip import OSGP
from lentando.optimizers.rules.push_sum import PushSum
from lentando.optimizers.rules.wire import WireDtype

CASES = int(os.environ.get("LENTANDO_GOSSIP_CASES", selected_cases("400", "1000")))
DIMENSION = 4


@st.composite
def topologies(draw: st.DrawFn) -> tuple[int, Topology]:
    """A number of ranks, and a graph among them: a cycle through all with any other edges, or an exponential one."""
    size = draw(st.integers(2, 7))
    kind = draw(st.sampled_from(["digraph", "one peer", "two peers"]))
    if kind == "one peer":
        return size, OnePeerExponential()
    if kind == "two peers":
        return size, PPeerExponential(2)
    graph = nx.cycle_graph(size, create_using=nx.DiGraph)
    edges = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1)).filter(lambda edge: edge[0] != edge[1])
    graph.add_edges_from(draw(st.lists(edges, max_size=2 * size)))
    return size, FromGraph(graph)


def start(rank: int) -> Any:
    return (np.arange(DIMENSION) + 10.0 * rank) / 7  # which 16 bits cannot hold


def gossiping(transport: Transport, base: OSGP, steps: int, drain: bool = False) -> tuple[Any, float]:
    """A rank's x and w, messages in flight included, after some steps without gradients."""
    worker = Worker(transport, lambda *_: np.zeros(DIMENSION), start(0), lambda _: 0.1, base=base)
    running = worker.replica.base.steps
    assert isinstance(running, PushSum)
    worker.model.x[:] = start(transport.rank)
    worker.replica.progress.has_started = True
    running.adopt_consensus()
    for _ in range(steps):
        worker.run(1)
        assert running.weight > 0
        assert len(running.exchanges.in_flight) <= base.staleness
    if drain:
        worker.replica.setup.wait_in_flight()
        return worker.model.x.copy(), running.weight
    running.state_dict()  # waits for what is in flight, and leaves it there
    x, w = running.biased[0].copy(), running.weight
    for pending in running.exchanges.in_flight:
        for message in pending.received:
            x, w = x + message.shares[0].read(slice(None)), w + message.weight
    return x, w


@pytest.mark.slow
@settings(max_examples=CASES, deadline=None)
@given(
    graph=topologies(),
    staleness=st.integers(0, 4),
    deterministic=st.booleans(),
    steps=st.integers(0, 8),
    jitter=st.sampled_from([0.0, 0.01, 0.3]),
    slow=st.integers(0, 6),
    seed=st.integers(0, 2**16),
    wire_dtype=st.sampled_from([None, "bfloat16", "float16"]),
)
def test_sums_of_x_and_w_never_change(
    graph: tuple[int, Topology],
    staleness: int,
    deterministic: bool,
    steps: int,
    jitter: float,
    slow: int,
    seed: int,
    wire_dtype: WireDtype | None,
) -> None:
    """O39 and O49: with stragglers, messages that take up to several steps, and rounded ones."""
    size, topology = graph
    network = Network(latency_seconds=0.01, jitter_seconds=jitter)
    compute = Compute(0.1, "exponential", stragglers={slow % size: 5.0})
    base = OSGP(topology, staleness, deterministic, wire_dtype)
    outcome = simulate(
        lambda transport: gossiping(transport, base, steps), size, network=network, compute=compute, seed=seed
    )
    assert_allclose(sum(x for x, _ in outcome), sum(start(rank) for rank in range(size)), rtol=1e-12)
    assert sum(w for _, w in outcome) == pytest.approx(size, rel=1e-12)


@pytest.mark.slow
@settings(max_examples=max(20, CASES // 50), deadline=None)
@given(graph=topologies(), staleness=st.integers(0, 3), jitter=st.sampled_from([0.0, 0.3]), seed=st.integers(0, 99))
def test_replicas_reach_the_mean(graph: tuple[int, Topology], staleness: int, jitter: float, seed: int) -> None:
    """O40 and O49."""
    size, topology = graph
    network, compute = Network(latency_seconds=0.01, jitter_seconds=jitter), Compute(0.1, "exponential")
    base = OSGP(topology, staleness)
    outcome = simulate(
        lambda transport: gossiping(transport, base, 600, drain=True), size, network=network, compute=compute, seed=seed
    )
    for z, _ in outcome:
        assert_allclose(z, sum(start(rank) for rank in range(size)) / size, atol=1e-3)


@pytest.mark.parametrize("staleness", [0, 2])
def test_lost_message_is_noticed_by_the_rank_that_waits_for_it(staleness: int) -> None:
    """O52: the sums would be short of exactly that message; no rank trains on with them."""
    lost = Drop(sender=1, nth=3, tag=1)
    with pytest.raises((DeadlockError, SimulationError), match="rank|waits"):
        simulate(lambda transport: gossiping(transport, OSGP(staleness=staleness), 12), 4, faults=[lost])


@pytest.mark.parametrize("staleness", [0, 2])
def test_doubled_message_is_noticed_by_its_number(staleness: int) -> None:
    """O52."""
    doubled = Duplicate(sender=1, nth=2, tag=1)
    with pytest.raises(SimulationError, match="rank") as error:
        simulate(lambda transport: gossiping(transport, OSGP(staleness=staleness), 12), 4, faults=[doubled])
    assert isinstance(error.value.__cause__, MismatchError)
    assert "a message was lost, doubled or overtaken" in str(error.value.__cause__)
