"""Rounds in which the ranks take unequally many steps: given, or as many as fit into the seconds of a round."""

import time
from typing import Any

import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker

from lentando.comm.cluster import Compute
from lentando.comm.errors import ConfigurationError, MismatchError
from lentando.comm.simulation import simulate
from lentando.comm.transport import Array, Transport
from lentando.optimizers.replica.state import copied
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.period import PostLocal
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.optimizers.rules.unequal_period import RoundSeconds, StepsByRank

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
EXACT = {"rtol": 0, "atol": 1e-13}
RATE = 0.05


def worker_of(transport: Transport, period: Any, **settings: Any) -> Worker:
    settings = {"base": LocalSGD(), "outer": SlowMomentum(0.8, 0.5), **settings}
    return Worker(transport, QUADRATIC, START, lambda step: RATE, period=period, **settings)


def run_rounds(worker: Worker, rounds: int, seconds: float = 0.0) -> Array:
    """Train until so many rounds; each step takes so long."""
    while worker.replica.rounds < rounds:
        worker.run(1)
        if seconds:
            time.sleep(seconds)
    return worker.model.x


def steps_of(size: int) -> list[int]:
    """Other numbers of steps on neighbouring ranks; 2 on the last."""
    return [5 - rank % 4 for rank in range(size - 1)] + [2]


@pytest.mark.parametrize("weighting", ["equal", "steps", "normalized"])
def test_given_numbers_of_steps_equal_the_reference(transport: Transport, weighting: str) -> None:
    steps = steps_of(transport.size)
    worker = worker_of(transport, StepsByRank(steps), weighting=weighting)
    expected = reference.unequal_slowmo(4, START, QUADRATIC, lambda number: steps, RATE, 0.8, 0.5, weighting)
    assert_allclose(run_rounds(worker, 4), expected, **EXACT)
    assert_array_equal(transport.allgather(worker.model.x), np.tile(worker.model.x, (transport.size, 1)))
    assert worker.replica.inner_steps == 4 * max(steps)
    assert worker.replica.period == steps[transport.rank]


def slow(rank: int) -> float:
    """How much longer a step takes on a rank."""
    return 3.0 if rank == 0 else 1.0


SECONDS = RoundSeconds(1.2, initial_steps=2)


def in_virtual_time(worker: Worker, rounds: int) -> list[tuple[int, float]]:
    """Own steps, and the clock at the end, of each round."""
    found = []
    for number in range(1, rounds + 1):
        assert worker.replica.period is not None
        steps = worker.replica.period
        run_rounds(worker, number)
        found.append((steps, round(worker.replica.transport.clock(), 3)))
    return found


@pytest.mark.parametrize("weighting", ["equal", "steps"])
def test_rounds_of_seconds_in_the_simulator_equal_the_reference(transport: Transport, weighting: str) -> None:
    """A step of 0.1 s, and of 0.3 s on rank 0: after the first round all ranks end at the same time."""
    size = transport.size

    def train(over: Transport) -> tuple[Array, list[tuple[int, float]], Any]:
        worker = worker_of(over, SECONDS, weighting=weighting, algorithm="ring")
        found = in_virtual_time(worker, 4)
        return worker.model.x, found, report_of(worker.replica)["equalising_steps"]

    compute = Compute(0.1, stragglers={0: 3.0})
    steps = [4 if rank == 0 else 12 for rank in range(size)]
    expected = reference.unequal_slowmo(
        4, START, QUADRATIC, lambda number: steps if number else [2] * size, RATE, 0.8, 0.5, weighting
    )
    for rank, (x, found, proposed) in enumerate(simulate(train, size, compute=compute)):
        assert [taken for taken, _ in found] == [2, *[steps[rank]] * 3]
        assert_allclose([clock for _, clock in found], [0.6, 1.8, 3.0, 4.2], atol=0.01)
        assert proposed == steps
        assert_allclose(x, expected, **EXACT)


def test_the_simulator_trains_the_same_numbers(transport: Transport) -> None:
    """Of integers, whose sums are exact in any order."""
    gradient = reference.constant(DIMENSION)

    def train(over: Transport) -> Array:
        worker = Worker(
            over, gradient, np.zeros(DIMENSION), lambda step: 0.5, base=LocalSGD(), outer=SlowMomentum(1.0, 0.5),
            period=StepsByRank(steps_of(over.size)), algorithm="ring", weighting="equal",
        )  # fmt: skip
        return run_rounds(worker, 4)

    assert_array_equal(train(transport), simulate(train, transport.size)[transport.rank])


def test_a_slow_rank_takes_fewer_steps(transport: Transport) -> None:
    """By the real clock, with rank 0 three times slower: the others wait for less than half a slow step."""
    worker = worker_of(transport, RoundSeconds(0.48, initial_steps=2, measured_rounds=3), weighting="steps")
    run_rounds(worker, 5, seconds=0.04 * slow(transport.rank))  # more than a busy machine adds
    assert isinstance(worker.replica.progress.period, RoundSeconds)
    steps = worker.replica.progress.period.steps_by_rank
    assert (transport.allgather(np.array(steps)) == steps).all()
    assert worker.replica.period == steps[transport.rank]
    assert 1 <= steps[0] <= 4
    if transport.size > 1:
        assert max(steps[1:]) > steps[0]
    assert_array_equal(transport.allgather(worker.model.x), np.tile(worker.model.x, (transport.size, 1)))


@pytest.mark.parametrize("weighting", ["equal", "steps"])
def test_a_state_dict_continues_bit_identically_at_every_step(transport: Transport, weighting: str) -> None:
    """The ranks save in the same round, each after its own steps; the times have been measured before."""

    def new() -> Worker:
        return worker_of(transport, RoundSeconds(0.02, 2, measured_rounds=2), weighting=weighting)

    worker = new()
    run_rounds(worker, 2, seconds=0.002 * slow(transport.rank))
    saved: list[tuple[Array, dict[str, Any]]] = []
    while worker.replica.rounds < 4:
        saved.append((worker.model.x.copy(), copied(worker.replica.state_dict())))
        worker.run(1)
    for part in range(3):
        x, state = saved[part * (len(saved) - 1) // 2]
        resumed = new()
        resumed.model.x[:] = x
        resumed.replica.load_state_dict(state)
        assert_array_equal(run_rounds(resumed, 4), worker.model.x)
        assert resumed.replica.inner_steps == worker.replica.inner_steps


def test_in_virtual_time_a_run_that_is_resumed_decides_alike() -> None:
    """Measuring continues: the moving means of the times are a part of the state."""

    def train(over: Transport) -> Any:
        worker = worker_of(over, SECONDS)
        in_virtual_time(worker, 2)
        x, state = worker.model.x.copy(), copied(worker.replica.state_dict())
        expected = run_rounds(worker, 5).copy()
        resumed = worker_of(over, SECONDS)
        resumed.model.x[:] = x
        resumed.replica.load_state_dict(state)
        assert_array_equal(run_rounds(resumed, 5), expected)

    simulate(train, 3, compute=Compute(0.1, stragglers={1: 2.5}))


def test_ranks_that_run_out_of_batches(transport: Transport) -> None:
    """Inside join: each rank has batches for two of its rounds and one step, and all end with equal parameters."""
    steps = steps_of(transport.size)
    worker = worker_of(transport, StepsByRank(steps), weighting="normalized")
    worker.run_joined(2 * steps[transport.rank] + 1)
    assert worker.replica.rounds == 3
    assert_array_equal(transport.allgather(worker.model.x), np.tile(worker.model.x, (transport.size, 1)))
    expected = reference.unequal_slowmo(
        3, START, QUADRATIC, lambda number: steps if number < 2 else [1] * transport.size, RATE, 0.8, 0.5, "normalized"
    )
    assert_allclose(worker.model.x, expected, **EXACT)


def test_averaged_evaluates_in_the_middle_of_a_round(transport: Transport) -> None:
    worker = worker_of(transport, StepsByRank(steps_of(transport.size)))
    run_rounds(worker, 1)
    worker.run(1)
    own = worker.model.x.copy()
    with worker.replica.averaged():
        assert_allclose(worker.model.x, transport.allgather(own).mean(axis=0), **EXACT)


def test_a_restart_in_the_middle_of_a_round(transport: Transport) -> None:
    """The ranks have taken unequally many steps, and count on from the most of them."""
    steps = steps_of(transport.size)
    worker = worker_of(transport, StepsByRank(steps))
    run_rounds(worker, 1)
    worker.run(steps[transport.rank] - 1)
    own = worker.model.x.copy()
    worker.replica.restart()
    assert_allclose(worker.model.x, transport.allgather(own).mean(axis=0), **EXACT)
    assert worker.replica.inner_steps == 2 * max(steps) - 1
    run_rounds(worker, 2)
    assert worker.replica.inner_steps == 3 * max(steps) - 1
    assert_array_equal(transport.allgather(worker.model.x), np.tile(worker.model.x, (transport.size, 1)))


class OwnRounds(RoundSeconds):
    """A class that does not say that its decisions cannot differ: the ranks compare them."""


@pytest.mark.parametrize("period", [PostLocal(3, RoundSeconds(1.25, measured_rounds=1)), OwnRounds(1.25)], ids=str)
def test_the_first_round_that_can_be_measured_decides(period: Any) -> None:
    """The very first step is not measured, and a round of this step alone does not count."""

    def train(over: Transport) -> int | None:
        worker = worker_of(over, period)
        run_rounds(worker, 5)
        return worker.replica.period

    assert simulate(train, 3, compute=Compute(0.1, stragglers={1: 3.0})) == [12, 4, 12]


def test_a_rank_with_hardly_any_batches_does_not_keep_the_others_from_measuring() -> None:
    """Inside join: rank 1 has one batch, whose time is not measured."""

    def train(over: Transport) -> Any:
        worker = worker_of(over, RoundSeconds(0.8))
        worker.run_joined(1 if over.rank == 1 else 4 + 2 * 8)
        assert isinstance(worker.replica.progress.period, RoundSeconds)
        return worker.replica.rounds, worker.replica.progress.period.steps_by_rank

    assert simulate(train, 3, compute=Compute(0.1)) == [(3, [8, 4, 8])] * 3


def test_after_synchronous_steps(transport: Transport) -> None:
    steps = steps_of(transport.size)
    worker = worker_of(transport, PostLocal(2, StepsByRank(steps)))
    run_rounds(worker, 4)
    expected = reference.unequal_slowmo(
        4, START, QUADRATIC, lambda number: steps if number >= 2 else [1] * transport.size, RATE, 0.8, 0.5, "equal"
    )
    assert_allclose(worker.model.x, expected, **EXACT)


def test_ranks_in_different_rounds_are_an_error_on_every_rank(transport: Transport) -> None:
    """Rank 0 evaluates a round too early."""
    if transport.size == 1:
        return
    worker = worker_of(transport, StepsByRank([2] * transport.size))
    run_rounds(worker, 1)

    def act() -> None:
        if transport.rank == 0:
            worker.replica.consensus_distance()
        run_rounds(worker, 2)

    with pytest.raises(MismatchError, match="not about to do the same thing"):
        act()


@pytest.mark.parametrize(
    ("period", "settings", "message"),
    [
        (RoundSeconds(1.0), {"base": AllReduce()}, r"RoundSeconds\(.*\) is not possible over AllReduce\(.*LocalSGD"),
        (RoundSeconds(1.0), {"base": SGP()}, r"RoundSeconds\(.*\) is not possible over SGP\("),
        (PostLocal(2, RoundSeconds(1.0)), {"base": AllReduce()}, "is not possible over AllReduce"),
        (StepsByRank([2]), {"exact_average": False}, "is not possible with exact_average=False"),
        (RoundSeconds(1.0), {"delay": 1}, r"delay=1 is not possible with RoundSeconds\("),
        (RoundSeconds(1.0), {"fragments": 2}, r"fragments=2 is not possible with RoundSeconds\("),
        (StepsByRank([2] * 9), {}, r"steps_by_rank must have a number for each of the \d ranks?, got 9"),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_sentence_on_every_rank(
    transport: Transport, period: Any, settings: Any, message: str
) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        worker_of(transport, period, **settings)
    assert "\n" not in str(caught.value)


def test_different_seconds_are_an_error_on_every_rank(transport: Transport) -> None:
    if transport.size > 1:
        with pytest.raises(MismatchError, match="the settings differ between ranks"):
            worker_of(transport, RoundSeconds(1.0 + transport.rank % 2))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RoundSeconds(0), "seconds of RoundSeconds must be a number > 0, got 0"),
        (lambda: RoundSeconds("1"), "seconds of RoundSeconds must be a number > 0"),
        (lambda: RoundSeconds(1.0, initial_steps=1), "initial_steps must be an integer >= 2"),
        (lambda: RoundSeconds(1.0, measured_rounds=0), "measured_rounds must be an integer >= 1"),
        (lambda: StepsByRank(12), "steps_by_rank must be a list"),
        (lambda: StepsByRank([3, 0]), "steps_by_rank of rank 1 must be an integer >= 1"),
    ],
)
def test_values_out_of_range(make: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        make()
