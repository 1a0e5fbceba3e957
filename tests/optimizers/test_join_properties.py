"""Any unevenness of the data, on ranks of any speed: no rank waits for ever, and the numbers are the reference's."""

from typing import Any

import numpy as np
import pytest
import reference
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose
from numpy_model import Worker

from lentando.comm.simulation import Compute, Network, simulate
from lentando.comm.topology import Ring, StaticExponential
from lentando.comm.transport import Transport
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.push_sum import PushSum
from lentando.optimizers.rules.slow_momentum import SlowMomentum

DIMENSION = 7
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
EXACT = {"rtol": 1e-10, "atol": 1e-10}

counts_by_rank = st.lists(st.integers(0, 11), min_size=1, max_size=6)
seeds = st.integers(0, 2**16)


def changing(step: int) -> float:
    return 0.05 + 0.02 * (step % 7)


def train(counts: list[int], seed: int, rates: Any, **options: Any) -> list[Any]:
    """Parameters, inner steps and rounds of every rank."""

    def program(transport: Transport) -> Any:
        worker = Worker(transport, QUADRATIC, START, rates, **options)
        worker.run_joined(counts[transport.rank])
        return worker.model.x.copy(), worker.replica.inner_steps, worker.replica.rounds

    return on_unequal_ranks(program, len(counts), seed)


def on_unequal_ranks(program: Any, size: int, seed: int) -> list[Any]:
    network = Network(latency_seconds=0.01, jitter_seconds=0.3)
    compute = Compute(0.1, "exponential", stragglers={seed % size: 5.0})
    return list(simulate(program, size, network=network, compute=compute, seed=seed))


@pytest.mark.slow
@settings(max_examples=150, deadline=None)
@given(
    counts=counts_by_rank,
    period=st.integers(1, 5),
    alpha=st.floats(0.1, 2.0),
    beta=st.sampled_from([0.0, 0.3, 0.9]),
    algorithm=st.sampled_from(["ring", "backend"]),
    seed=seeds,
)
def test_slowmo(counts: list[int], period: int, alpha: float, beta: float, algorithm: Any, seed: int) -> None:
    rule = SlowMomentum(alpha, beta)
    outcome = train(counts, seed, changing, base=LocalSGD(), outer=rule, period=period, algorithm=algorithm)
    expected = reference.uneven_slowmo(counts, START, QUADRATIC, period, changing, alpha, beta)
    for x, inner_steps, rounds in outcome:
        assert_allclose(x, expected.x[0], **EXACT)
        assert (x == outcome[0][0]).all()
        assert (inner_steps, rounds) == (max(counts), -(-max(counts) // period))


@pytest.mark.slow
@settings(max_examples=80, deadline=None)
@given(counts=counts_by_rank, period=st.none() | st.integers(1, 5), seed=seeds)
def test_averaged_gradients(counts: list[int], period: int | None, seed: int) -> None:
    outcome = train(counts, seed, changing, momentum=0.9, base=AllReduce(), period=period)
    expected = reference.uneven_synchronous_sgd(counts, START, QUADRATIC, changing, 0.9)
    for x, inner_steps, _ in outcome:
        assert_allclose(x, expected, **EXACT)
        assert (x == outcome[0][0]).all()
        assert inner_steps == max(counts)


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    counts=counts_by_rank,
    topology=st.sampled_from([Ring(), StaticExponential(), SGP().topology]),
    staleness=st.integers(0, 3),
    deterministic=st.booleans(),
    period=st.none() | st.integers(1, 5),
    seed=seeds,
)
def test_gossip(
    counts: list[int], topology: Any, staleness: int, deterministic: bool, period: int | None, seed: int
) -> None:
    taken: list[Any] = []

    def noted(worker: int, step: int, x: Any) -> Any:
        taken.append(QUADRATIC(worker, step, x))
        return taken[-1]

    def program(transport: Transport) -> Any:
        base = OSGP(topology, staleness, deterministic)
        worker = Worker(transport, noted, START, lambda _: 0.1, base=base, period=period)
        worker.run_joined(counts[transport.rank])
        running = worker.replica.base.steps
        assert isinstance(running, PushSum)
        assert not running.state_dict()["under_way"]
        return worker.model.x.copy(), running.biased[0].copy(), running.weight, worker.replica.inner_steps

    outcome = on_unequal_ranks(program, len(counts), seed)
    moved = len(counts) * START - sum(x for _, x, _, _ in outcome)
    assert len(taken) == sum(counts)
    assert_allclose(moved, 0.1 * sum(taken, np.zeros(DIMENSION)), **EXACT)
    assert_allclose(sum(w for _, _, w, _ in outcome), len(counts), rtol=1e-12)
    assert {steps for _, _, _, steps in outcome} == {max(counts)}
    if period is not None:
        assert all((z == outcome[0][0]).all() for z, _, _, _ in outcome)


@pytest.mark.parametrize("base", [LocalSGD(), AllReduce(), SGP()])
def test_waiting_for_others_is_no_computing(base: Any) -> None:
    """Rank 1 takes 0.5 s for a step, and then waits for rank 0, which takes 0.1 s for each of many."""

    def program(transport: Transport) -> Any:
        worker = Worker(transport, QUADRATIC, START, changing, base=base, period=3)
        for _ in range(2):
            worker.run_joined([24, 6][transport.rank])
        return report_of(worker.replica)

    fast, slow = simulate(program, 2, compute=Compute(0.1, stragglers={1: 5.0}))
    assert fast["compute_seconds"] == pytest.approx(0.1)
    assert slow["compute_seconds"] == pytest.approx(0.5)
    assert slow["seconds_per_step"] < 0.6
