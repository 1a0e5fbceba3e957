"""Uneven data: ranks that run out of batches take part with weight 0 until all have, and agree with the reference."""

import itertools
from collections.abc import Callable, Sequence
from math import ceil, sqrt
from typing import Any

import numpy as np
import pytest
import reference
from case_selection import selected_cases
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker

from lentando.comm.errors import ConfigurationError, MismatchError, NonFiniteError
from lentando.comm.topology import StaticExponential
from lentando.comm.transport import Array, Transport
from lentando.optimizers.methods import adacomm
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.push_sum import PushSum
from lentando.optimizers.rules.slow_momentum import SlowMomentum

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
EXACT = {"rtol": 1e-11, "atol": 1e-11}


def falling(size: int) -> list[int]:
    return [max(0, 11 - 3 * rank) for rank in range(size)]


COUNTS: dict[str, Callable[[int], list[int]]] = {
    "rank 0 has most": falling,
    "rank 0 has none": lambda size: [0, *(5 + 2 * rank for rank in range(1, size))] if size > 1 else [0],
    "only the last has any": lambda size: [0] * (size - 1) + [7],
    "a round apart": lambda size: [4 + 4 * (rank % 2) for rank in range(size)],
    "none at all": lambda size: [0] * size,
}

uneven = pytest.mark.parametrize("uneven", COUNTS)


def changing(step: int) -> float:
    return 0.05 + 0.02 * (step % 7)


def worker(transport: Transport, rates: Any = changing, **options: Any) -> Worker:
    return Worker(transport, QUADRATIC, START, rates, **options)


def everyones(transport: Transport, array: Array) -> Array:
    return transport.allgather(np.ascontiguousarray(array))


def assert_same_bits(transport: Transport, array: Array) -> None:
    everyone = everyones(transport, array)
    assert (everyone == everyone[0]).all()


def joined(transport: Transport, counts: Sequence[int], rates: Any = changing, **options: Any) -> Worker:
    mine = worker(transport, rates, **options)
    mine.run_joined(counts[transport.rank])
    return mine


@uneven
@pytest.mark.parametrize("algorithm", ["ring", "backend"])
@pytest.mark.parametrize(("alpha", "beta"), [(0.8, 0.6), *selected_cases([], [(1.0, 0.0)])])
def test_slowmo_averages_over_the_ranks_that_took_steps(
    transport: Transport, uneven: str, algorithm: Any, alpha: float, beta: float
) -> None:
    counts = COUNTS[uneven](transport.size)
    rule = SlowMomentum(alpha, beta)
    mine = joined(transport, counts, base=LocalSGD(), outer=rule, period=4, algorithm=algorithm)
    expected = reference.uneven_slowmo(counts, START, QUADRATIC, 4, changing, alpha, beta)
    assert_allclose(mine.model.x, expected.x[transport.rank], **EXACT)
    assert_same_bits(transport, mine.model.x)
    assert mine.replica.inner_steps == max(counts)
    assert mine.replica.rounds == -(-max(counts) // 4)


@uneven
@pytest.mark.parametrize("algorithm", ["ring", "backend"])
@pytest.mark.parametrize("momentum", [0.9, *selected_cases([], [0.0])])
def test_gradients_are_averaged_over_the_ranks_that_have_some(
    transport: Transport, uneven: str, algorithm: Any, momentum: float
) -> None:
    counts = COUNTS[uneven](transport.size)
    mine = joined(transport, counts, momentum=momentum, base=AllReduce(algorithm))
    expected = reference.uneven_synchronous_sgd(counts, START, QUADRATIC, changing, momentum)
    assert_allclose(mine.model.x, expected, **EXACT)
    assert_same_bits(transport, mine.model.x)
    assert_same_bits(transport, mine.model.momentum_buffer)
    assert mine.replica.inner_steps == max(counts)


def test_averaged_gradients_continue_after_uneven_data(transport: Transport) -> None:
    """A rank that ran out has kept its momentum and its count of steps up, and its own learning rate."""
    counts = falling(transport.size)
    mine = worker(transport, momentum=0.9, base=AllReduce(), period=3)
    mine.run_joined(counts[transport.rank])
    mine.run(5)
    twice = [max(counts) + 5] * transport.size
    gradient = reference.until([*counts], QUADRATIC)

    def second(i: int, step: int, x: Any) -> Any:
        if step >= max(counts):
            return QUADRATIC(i, step, x)
        active = sum(step < count for count in counts)
        return gradient(i, step, x) * transport.size / active

    expected = reference.uneven_synchronous_sgd(twice, START, second, changing, 0.9)
    assert_allclose(mine.model.x, expected, **EXACT)
    assert_same_bits(transport, mine.model.x)


def running(of: Worker) -> PushSum:
    base = of.replica.base.steps
    assert isinstance(base, PushSum)
    return base


@uneven
@pytest.mark.parametrize(
    ("staleness", "directed"),
    selected_cases([(0, True), (1, False), (3, True)], [*itertools.product([0, 1, 3], [False, True])]),
)
def test_gossip_continues_through_ranks_that_have_ended(
    transport: Transport, uneven: str, staleness: int, directed: bool
) -> None:
    """Their x and w continue to mix, without gradients: the sums over all ranks are what the gradients made of them."""
    counts = COUNTS[uneven](transport.size)
    topology = StaticExponential() if directed else SGP().topology
    base = OSGP(topology, staleness, deterministic=True) if staleness else SGP(topology)
    mine = joined(transport, counts, lambda step: 0.1, base=base)
    graphs = topology.for_size(transport.size)
    gradient = reference.until(counts, QUADRATIC)
    outcome = reference.push_sum_sgd(transport.size, max(counts), START, gradient, graphs.mixing_matrix, 0.1, staleness)
    x, w = running(mine).biased[0], running(mine).weight
    assert not running(mine).state_dict()["under_way"]
    if not staleness:
        assert_allclose(x, outcome.x[transport.rank], **EXACT)
        assert_allclose(w, outcome.w[transport.rank], **EXACT)
    moved = transport.size * START - everyones(transport, x).sum(axis=0)
    z = everyones(transport, mine.model.x)
    assert_allclose(everyones(transport, np.array([w])).sum(), transport.size, rtol=1e-13)
    assert_allclose(z[transport.rank], x / w, **EXACT)
    steps = taken_gradients(transport, counts, staleness, graphs.mixing_matrix)
    assert_allclose(moved, 0.1 * steps, **EXACT)


def taken_gradients(transport: Transport, counts: Sequence[int], staleness: int, matrix: Any) -> Any:
    """The sum of all gradients that the reference takes."""
    total = np.zeros(DIMENSION)

    def noted(i: int, step: int, x: Any) -> Any:
        nonlocal total
        found = reference.until(counts, QUADRATIC)(i, step, x)
        total = total + found
        return found

    reference.push_sum_sgd(transport.size, max(counts), START, noted, matrix, 0.1, staleness)
    return total


@uneven
@pytest.mark.parametrize("base", [SGP(), OSGP(staleness=2, deterministic=True), DPSGD()])
def test_rounds_continue_over_gossip_and_the_last_one_is_closed_by_an_average(
    transport: Transport, uneven: str, base: Any
) -> None:
    counts = COUNTS[uneven](transport.size)
    period = 3
    mine = joined(transport, counts, lambda step: 0.1, base=base, outer=SlowMomentum(0.9, 0.5), period=period)
    # Gossip without gradients does not move the mean: the reference closes the last round at its usual end.
    steps = -(-max(counts) // period) * period
    expected = reference.push_sum_sgd(
        transport.size,
        steps,
        START,
        reference.until(counts, QUADRATIC),
        base.topology.for_size(transport.size).mixing_matrix,
        0.1,
        getattr(base, "staleness", 0),
        period,
        0.9,
        0.5,
    )
    assert_allclose(mine.model.x, expected.x[transport.rank], **EXACT)
    assert_same_bits(transport, mine.model.x)
    assert mine.replica.inner_steps == max(counts)


def test_gossip_without_averages_keeps_each_ranks_own_momentum(transport: Transport) -> None:
    counts = falling(transport.size)
    settings = {"base": SGP(), "outer": SlowMomentum(0.9, 0.5), "period": 3, "exact_average": False}
    mine = joined(transport, counts, lambda step: 0.1, **settings)
    expected = reference.push_sum_sgd(
        transport.size,
        max(counts),
        START,
        reference.until(counts, QUADRATIC),
        SGP().topology.for_size(transport.size).mixing_matrix,
        0.1,
        period=3,
        alpha=0.9,
        beta=0.5,
        exact_average=False,
    )
    assert_allclose(mine.model.x, expected.z[transport.rank], **EXACT)


@uneven
def test_adacomm_decides_alike_everywhere_by_the_losses_of_those_that_took_steps(
    transport: Transport, uneven: str
) -> None:
    counts = [3 * count for count in COUNTS[uneven](transport.size)]

    def loss(x: Any) -> float:
        return float(np.square(x - 0.5).mean())

    def adapted(losses: list[float]) -> int:
        return max(1, ceil(sqrt(losses[-1] / losses[0]) * 5 * (1 - 1e-6))) if len(losses) > 1 else 5

    settings = vars(adacomm(initial_period=5, interval_steps=1, refined=False))
    mine = joined(transport, counts, lambda step: 0.25, loss=lambda own: loss(own.model.x), **settings)
    expected = reference.uneven_slowmo(counts, START, QUADRATIC, 5, lambda step: 0.25, adapted=adapted, loss=loss)
    assert_allclose(mine.model.x, expected.x[transport.rank], **EXACT)
    assert_same_bits(transport, np.array([decision["period"] for decision in report_of(mine.replica)["decisions"]]))


METHODS: dict[str, dict[str, Any]] = {
    "all-reduce": {"base": AllReduce()},
    "local": {"base": LocalSGD(), "outer": SlowMomentum(0.8, 0.6), "period": 4},
    "local, averaged momentum": {"base": LocalSGD(), "period": 4, "base_buffers": "average"},
    "gossip": {"base": SGP(StaticExponential())},
    "gossip and rounds": {"base": OSGP(staleness=1, deterministic=True), "outer": SlowMomentum(0.8, 0.6), "period": 4},
}


@pytest.mark.parametrize("method", METHODS)
def test_on_even_data_join_changes_no_bit(transport: Transport, method: str) -> None:
    plain = worker(transport, momentum=0.5, **METHODS[method])
    plain.run(12)
    with_join = worker(transport, momentum=0.5, **METHODS[method])
    for _ in range(3):
        with_join.run_joined(4)
    plain.replica.setup.wait_in_flight()
    assert_array_equal(with_join.model.x, plain.model.x)
    assert_array_equal(with_join.model.momentum_buffer, plain.model.momentum_buffer)
    assert with_join.replica.rounds == plain.replica.rounds


@pytest.mark.parametrize("method", ["all-reduce", "local"])
def test_on_even_data_join_sends_nothing_more_before_its_end(transport: Transport, method: str) -> None:
    def sent_by(mine: Worker) -> Any:
        before = transport.traffic.copy()
        mine.run(8)
        after = transport.traffic
        return (
            after.bytes_sent - before.bytes_sent,
            after.messages - before.messages,
            after.collectives - before.collectives,
        )

    plain, with_join = worker(transport, **METHODS[method]), worker(transport, **METHODS[method])
    expected = sent_by(plain)
    with with_join.replica.join(with_join._step_along):
        found = sent_by(with_join)
    assert found == expected


@pytest.mark.parametrize("buffers", ["reset", "average", "maintain"])
def test_momentum_is_averaged_over_the_ranks_that_took_steps(transport: Transport, buffers: Any) -> None:
    """By hand: a gradient of 1 + rank, momentum 1/2; rank 0 has taken 4 steps, all others 2, then none."""
    counts = [4 if rank == 0 else 2 for rank in range(transport.size)]
    mine = Worker(
        transport, lambda rank, *_: np.full(DIMENSION, 1.0 + rank), START, lambda _: 0.5, 0.5,
        base=LocalSGD(), period=2, base_buffers=buffers,
    )  # fmt: skip
    mine.run_joined(counts[transport.rank])
    first = [1.5 * (1 + rank) for rank in range(transport.size)]
    of_rank_0 = {"reset": 0.0, "average": np.mean(first), "maintain": first[0]}[buffers]
    alone = 0.5 * (0.5 * of_rank_0 + 1) + 1
    expected = {"reset": 0.0, "average": alone, "maintain": alone if transport.rank == 0 else first[transport.rank]}
    assert_allclose(mine.model.momentum_buffer, expected[buffers])


def test_training_continues_after_join_without_it(transport: Transport) -> None:
    counts = falling(transport.size)
    mine = worker(transport, base=LocalSGD(), outer=SlowMomentum(0.8, 0.6), period=4)
    mine.run_joined(counts[transport.rank])
    mine.run(8)
    assert_same_bits(transport, mine.model.x)
    mine.run_joined(counts[::-1][transport.rank])
    assert_same_bits(transport, mine.model.x)
    assert mine.replica.inner_steps == 2 * max(counts) + 8


def test_average_that_is_not_finite_changes_no_rank_that_has_ended_either(transport: Transport) -> None:
    def diverging(rank: int, step: int, x: Any) -> Any:
        return np.full(DIMENSION, np.inf if step == 7 else 1.0)

    mine = Worker(transport, diverging, START, lambda _: 0.1, base=LocalSGD(), period=4)
    with pytest.raises(NonFiniteError):
        mine.run_joined(8 if transport.rank == 0 else 4)
    if transport.rank:
        assert_allclose(mine.model.x, START - 0.4, **EXACT)
    assert not mine.replica.joined


def test_ranks_that_train_without_join_say_so(transport: Transport) -> None:
    if transport.size == 1:
        return
    mine = worker(transport, base=LocalSGD(), period=4)
    with pytest.raises(MismatchError, match="inside join"):
        (mine.run_joined if transport.rank == 0 else mine.run)(4)


def test_rank_that_evaluates_while_another_has_ended_is_an_error_that_says_who(transport: Transport) -> None:
    if transport.size == 1:
        return
    mine = worker(transport, base=LocalSGD(), period=4)

    def evaluate_too_early() -> None:
        with mine.replica.join(mine._step_along):
            if transport.rank:
                mine.run(2)
                mine.replica.consensus_distance()

    with pytest.raises(MismatchError, match="having run out of its own batches"):
        evaluate_too_early()


def test_exception_leaves_join_at_once(transport: Transport) -> None:
    mine = worker(transport, base=LocalSGD(), period=4)
    before = transport.traffic.copy()

    def fail() -> None:
        with mine.replica.join(mine._step_along):
            mine.run(transport.rank % 3)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert transport.traffic == before
    assert not mine.replica.joined


def test_join_is_refused_where_it_means_nothing(transport: Transport) -> None:
    apart = worker(transport, base=LocalSGD(), outer=SlowMomentum(0.5, 0.5), period=4, exact_average=False)
    with pytest.raises(ConfigurationError, match="leave join out"):
        apart.run_joined(4)
    mine = worker(transport, base=LocalSGD(), period=4)
    with (
        mine.replica.join(mine._step_along),
        pytest.raises(ConfigurationError, match="cannot be nested"),
        mine.replica.join(mine._step_along),
    ):
        pass


def test_event_of_gossip_is_sent_inside_join_only(transport: Transport) -> None:
    mine = worker(transport, base=SGP())
    before = transport.traffic.copy()
    mine.run(4)
    assert transport.traffic.collectives == before.collectives
    mine.run_joined(4)
    assert transport.traffic.collectives == before.collectives + 4 + 1
