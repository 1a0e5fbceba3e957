"""SlowMo's identities (oracles O1 to O15, O17 to O19, O24) between a replica on each rank and the reference."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
from case_selection import selected_cases
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker

from lentando.comm.agreement import CONTROL_MESSAGE_BYTES
from lentando.comm.errors import ConfigurationError, MismatchError, NonFiniteError
from lentando.comm.reductions import ring_schedule
from lentando.comm.transport import Array, Transport
from lentando.comm.transports.single import SingleTransport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.slow_momentum import SlowMomentum

DIMENSION = 13  # no number of ranks divides it
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def fixed(rate: float) -> Callable[[int], float]:
    return lambda step: rate


def changing(step: int) -> float:
    """Another learning rate in each round and within it; 0 in the rounds of steps 8 to 11."""
    return 0.0 if 8 <= step < 12 else 0.05 + 0.02 * (step % 7)


def slowmo(transport: Transport, gradient: Any, rates: Any, steps: int, period: int, **settings: Any) -> Worker:
    rule = {name: settings.pop(name) for name in ("slow_lr", "slow_momentum", "nesterov") if name in settings}
    momentum = settings.pop("momentum", 0.0)
    worker = Worker(
        transport,
        gradient,
        START,
        rates,
        momentum,
        base=LocalSGD(),
        outer=SlowMomentum(**rule),
        period=period,
        **settings,
    )
    worker.run(steps)
    return worker


def everyones(transport: Transport, array: Array) -> Array:
    return transport.allgather(np.ascontiguousarray(array))


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("buffers", ["reset", "maintain", "average"])
def test_slowmo_equals_algorithm_1(transport: Transport, algorithm: str, nesterov: bool, buffers: str) -> None:
    settings = {"slow_lr": 0.8, "slow_momentum": 0.6, "nesterov": nesterov}
    worker = slowmo(
        transport, QUADRATIC, changing, 22, 4, **settings, momentum=0.5, algorithm=algorithm, base_buffers=buffers
    )
    expected = reference.slowmo(
        transport.size, 22, START, QUADRATIC, 4, changing, 0.8, 0.6, momentum=0.5, buffers=buffers, nesterov=nesterov
    )
    assert_allclose(worker.model.x, expected.x[transport.rank], **EXACT)
    shard = ring_schedule.shard(transport.rank, transport.size, DIMENSION)
    assert_allclose(worker.slow_buffer(), expected.u[transport.rank][shard], **EXACT)


def test_each_parameter_group_steps_by_its_own_learning_rate(transport: Transport) -> None:
    def rates(step: int) -> Any:
        return [0.1, 0.01 * step]

    def per_element(step: int) -> Any:
        return np.repeat(rates(step), [DIMENSION // 2, DIMENSION - DIMENSION // 2])

    worker = slowmo(transport, QUADRATIC, rates, 12, 3, slow_momentum=0.7)
    expected = reference.slowmo(transport.size, 12, START, QUADRATIC, 3, per_element, beta=0.7)
    assert_allclose(worker.model.x, expected.x[transport.rank], **EXACT)


def test_no_momentum_and_slow_lr_1_is_local_sgd(transport: Transport) -> None:
    """O1, bit-identically: the rule returns the average itself, not x0 - (x0 - average)."""
    slow = slowmo(transport, QUADRATIC, changing, 15, 4, slow_lr=1.0, slow_momentum=0.0)
    plain = Worker(transport, QUADRATIC, START, changing, base=LocalSGD(), period=4)
    assert_array_equal(slow.model.x, plain.run(15))
    expected = reference.slowmo(transport.size, 15, START, QUADRATIC, 4, changing)
    assert_allclose(slow.model.x, expected.x[transport.rank], **EXACT)


def test_period_1_is_heavy_ball_on_the_averaged_gradient(transport: Transport) -> None:
    """O2."""
    worker = slowmo(transport, QUADRATIC, fixed(0.1), 20, 1, slow_momentum=0.7)
    assert_allclose(
        worker.model.x, reference.synchronous_sgd(transport.size, 20, START, QUADRATIC, 0.1, momentum=0.7), **EXACT
    )


def test_period_1_without_momentum_is_synchronous_sgd(transport: Transport) -> None:
    """O3: averaging parameters after one step is averaging gradients before it."""
    averaged = slowmo(transport, QUADRATIC, fixed(0.1), 20, 1, slow_momentum=0.0).model.x
    synchronous = Worker(transport, QUADRATIC, START, fixed(0.1), base=AllReduce()).run(20)
    assert_allclose(averaged, synchronous, **EXACT)
    assert_allclose(synchronous, reference.synchronous_sgd(transport.size, 20, START, QUADRATIC, 0.1), **EXACT)


def test_one_worker_without_momentum_is_lookahead() -> None:
    """O4."""
    worker = slowmo(SingleTransport(), QUADRATIC, fixed(0.1), 20, 5, slow_lr=0.4, slow_momentum=0.0)
    assert_allclose(worker.model.x, reference.lookahead(20, START, QUADRATIC, 0.1, 5, 0.4), **EXACT)


def test_slow_lr_1_steps_from_the_average_along_the_carried_momentum(transport: Transport) -> None:
    """O5: x_{t+1,0} = average - beta gamma_t u_t, whatever the learning rates."""
    rates = [0.1, 0.03, 0.0, 0.2, 0.07]
    shard = ring_schedule.shard(transport.rank, transport.size, DIMENSION)
    worker = Worker(
        transport,
        QUADRATIC,
        START,
        lambda step: rates[step // 3],
        base=LocalSGD(),
        outer=SlowMomentum(1.0, 0.6),
        period=3,
    )
    for gamma in rates:
        u = worker.slow_buffer().copy()
        worker.run(2)
        with_gradient = worker.model.x - gamma * QUADRATIC(transport.rank, worker.replica.inner_steps, worker.model.x)
        average = everyones(transport, with_gradient).mean(axis=0)
        worker.run(1)
        assert_allclose(worker.model.x[shard], average[shard] - 0.6 * gamma * u, **EXACT)


@pytest.mark.parametrize("beta", [0.0, 0.9])
@pytest.mark.parametrize("gamma", [0.01, 0.3])
def test_first_round_moves_a_fraction_slow_lr_towards_the_average(
    transport: Transport, beta: float, gamma: float
) -> None:
    """O6: u_0 = 0, so neither momentum nor learning rate matters."""
    worker = slowmo(transport, QUADRATIC, fixed(gamma), 4, 4, slow_lr=0.7, slow_momentum=beta)
    average = reference.slowmo(transport.size, 4, START, QUADRATIC, 4, fixed(gamma)).x[0]
    assert_allclose(worker.model.x, START + 0.7 * (average - START), **EXACT)


def test_carried_momentum_follows_the_learning_rate(transport: Transport) -> None:
    """O8: when gamma halves, so does the velocity gamma u; velocities that ignore this go elsewhere."""
    worker = slowmo(transport, QUADRATIC, lambda step: 0.2 if step < 6 else 0.1, 12, 3, slow_momentum=0.8)

    def velocity_form(ratio: Callable[[float, float], float]) -> Array:
        x, v, before = np.tile(START, (transport.size, 1)), np.zeros(DIMENSION), 0.2
        for first in range(0, 12, 3):
            anchor, gamma = x[0].copy(), 0.2 if first < 6 else 0.1
            for step in range(first, first + 3):
                x = np.array([row - gamma * QUADRATIC(i, step, row) for i, row in enumerate(x)])
            v = 0.8 * ratio(gamma, before) * v + anchor - x.mean(axis=0)
            x, before = np.tile(anchor - v, (transport.size, 1)), gamma
        return x[0]

    assert_allclose(worker.model.x, velocity_form(lambda now, before: now / before), **EXACT)
    assert np.abs(worker.model.x - velocity_form(lambda now, before: 1.0)).max() > 1e-3


@pytest.mark.parametrize("rates", [fixed(0.125), lambda step: 0.5 / (1 + step // 4)])
def test_slow_momentum_does_not_depend_on_the_learning_rate(transport: Transport, rates: Any) -> None:
    """O9: for a fixed direction d, u_t = period d (1 - beta^t) / (1 - beta) under every schedule."""
    direction = np.arange(1.0, DIMENSION + 1)
    worker = slowmo(transport, lambda *_: direction, rates, 20, 4, slow_momentum=0.5)
    shard = ring_schedule.shard(transport.rank, transport.size, DIMENSION)
    assert_allclose(worker.slow_buffer(), 4 * direction[shard] * (1 - 0.5**5) / (1 - 0.5), rtol=1e-11)


@pytest.mark.parametrize(("alpha", "beta"), [(1.0, 0.5), (0.7, 0.6)])
def test_steady_step_is_slow_lr_over_1_minus_momentum(transport: Transport, alpha: float, beta: float) -> None:
    """O10: along a constant direction d, parameters move alpha gamma d / (1 - beta) per inner step in the end."""
    worker = slowmo(transport, lambda *_: np.ones(DIMENSION), fixed(0.01), 200, 4, slow_lr=alpha, slow_momentum=beta)
    before = worker.model.x.copy()
    moved = before - worker.run(4)
    assert_allclose(moved / 4, alpha * 0.01 / (1 - beta), rtol=1e-9)


def test_slow_lr_of_1_minus_momentum_keeps_the_base_step(transport: Transport) -> None:
    """O24: alpha = 1 - beta makes ((1 - beta) / alpha - 1)^2, the first slow-momentum term of Theorem 1, vanish: the
    effective step alpha gamma / (1 - beta) is then the base optimizer's own.
    """
    worker = slowmo(transport, lambda *_: np.ones(DIMENSION), fixed(0.01), 240, 4, slow_lr=0.3, slow_momentum=0.7)
    before = worker.model.x.copy()
    assert_allclose((before - worker.run(4)) / 4, 0.01, rtol=1e-9)


def test_local_momenta_averaged_after_the_update_give_the_same(transport: Transport) -> None:
    """O11: the rule is linear, so one average after it does as well as one before it."""
    apart = slowmo(transport, reference.constant(DIMENSION), fixed(0.25), 5, 5, slow_momentum=0.5, exact_average=False)
    together = slowmo(transport, reference.constant(DIMENSION), fixed(0.25), 5, 5, slow_momentum=0.5)
    assert_allclose(everyones(transport, apart.model.x).mean(axis=0), together.model.x, **EXACT)


@pytest.mark.parametrize("dimension", [1, 7, 64, *selected_cases([], [2, 3])])
@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_sharded_outer_step_equals_the_unsharded_rule_bit_identically(
    transport: Transport, dimension: int, algorithm: str
) -> None:
    """O11: also with fewer parameters than ranks. Powers of two and integers make every operation exact."""
    gradient = reference.constant(dimension)
    start = np.arange(float(dimension))
    workers = 2 ** (transport.size - 1).bit_length()  # a mean over ranks is exact for powers of two

    def padded(worker: int, step: int, x: Array) -> Array:
        return gradient(worker, step, x) if worker < transport.size else np.zeros(dimension)

    def scaled(worker: int, step: int, x: Array) -> Array:
        return gradient(worker, step, x) * transport.size

    worker = Worker(
        transport,
        scaled,
        start,
        fixed(0.5),
        base=LocalSGD(),
        outer=SlowMomentum(0.5, 0.5),
        period=2,
        algorithm=algorithm,
    )
    worker.run(4)
    expected = reference.slowmo(
        workers, 4, start, lambda i, k, x: padded(i, k, x) * workers, 2, fixed(0.5), alpha=0.5, beta=0.5
    )
    if workers == transport.size:
        assert_array_equal(worker.model.x, expected.x[0])
    else:
        assert_allclose(worker.model.x, expected.x[0], rtol=1e-14, atol=1e-14)


def test_replicas_are_bit_identical_after_every_outer_step(transport: Transport) -> None:
    """O12; in float32, where every rounding differs from every other."""
    worker = Worker(
        transport,
        QUADRATIC,
        START.astype(np.float32),
        changing,
        momentum=0.9,
        base=LocalSGD(),
        outer=SlowMomentum(0.9, 0.6),
        period=3,
    )
    for _ in range(6):
        everyone = everyones(transport, worker.run(3))
        assert (everyone == everyone[0]).all()
    assert everyones(transport, worker.run(1)).std(axis=0).max() > 0 or transport.size == 1


def test_without_average_or_momentum_the_outer_step_changes_nothing(transport: Transport) -> None:
    """O13, bit-identically."""
    worker = slowmo(transport, QUADRATIC, fixed(0.1), 8, 4, slow_momentum=0.0, exact_average=False)
    assert_array_equal(
        worker.model.x, reference.slowmo(transport.size, 8, START, QUADRATIC, 99, fixed(0.1)).x[transport.rank]
    )


def test_one_worker_needs_no_average() -> None:
    """O14, bit-identically."""
    apart = slowmo(SingleTransport(), QUADRATIC, changing, 16, 4, slow_momentum=0.6, exact_average=False)
    averaged = slowmo(SingleTransport(), QUADRATIC, changing, 16, 4, slow_momentum=0.6)
    assert_array_equal(apart.model.x, averaged.model.x)


def test_without_average_every_worker_keeps_its_own_momentum(transport: Transport) -> None:
    worker = slowmo(transport, QUADRATIC, changing, 22, 4, slow_lr=0.8, slow_momentum=0.6, exact_average=False)
    expected = reference.slowmo(transport.size, 22, START, QUADRATIC, 4, changing, 0.8, 0.6, exact_average=False)
    assert_allclose(worker.model.x, expected.x[transport.rank], **EXACT)
    assert_allclose(worker.slow_buffer(), expected.u[transport.rank], **EXACT)


def test_mean_of_the_local_momenta_is_the_averaged_momentum(transport: Transport) -> None:
    """O15: for the same inner trajectories, by linearity."""
    gradient = reference.constant(DIMENSION)
    apart = slowmo(transport, gradient, fixed(0.25), 12, 3, slow_momentum=0.5, exact_average=False)
    together = slowmo(transport, gradient, fixed(0.25), 12, 3, slow_momentum=0.5)
    shard = ring_schedule.shard(transport.rank, transport.size, DIMENSION)
    mean = everyones(transport, apart.slow_buffer()).mean(axis=0)
    assert_allclose(mean[shard], together.slow_buffer(), **EXACT)


@pytest.mark.parametrize("period", [1, 2, 5, 12])
def test_outer_steps_follow_inner_steps_period_2_period_and_so_on(transport: Transport, period: int) -> None:
    """O17: floor(K / period) of them in K steps; never one step late."""
    worker = Worker(transport, QUADRATIC, START, fixed(0.1), base=LocalSGD(), period=period)
    for step in range(1, 26):
        everyone = everyones(transport, worker.run(1))
        assert worker.replica.rounds == step // period
        assert transport.size == 1 or (everyone == everyone[0]).all() == (step % period == 0)


@pytest.mark.parametrize(("buffers", "averages"), [("reset", 1), ("maintain", 1), ("average", 2)])
def test_one_ring_all_reduce_per_round_and_nothing_between(transport: Transport, buffers: str, averages: int) -> None:
    """O18: floor(K / period) all-reduces of exactly the ring's bytes; averaging momentum adds one more each."""
    worker = Worker(
        transport,
        QUADRATIC,
        START,
        fixed(0.1),
        base=LocalSGD(),
        outer=SlowMomentum(1.0, 0.5),
        period=6,
        base_buffers=buffers,
        algorithm="ring",
    )
    sizes = [ring_schedule.chunk(number, transport.size, DIMENSION) for number in range(transport.size)]
    lengths = [part.stop - part.start for part in sizes]
    rank, size = transport.rank, transport.size
    elements = 2 * DIMENSION - lengths[(rank + 1) % size] - lengths[(rank + 2) % size] if size > 1 else 0
    sent = [
        sum(lengths[(rank - step) % size] > 0 for step in range(size - 1)),
        sum(lengths[(rank + 1 - step) % size] > 0 for step in range(size - 1)),
    ]
    for step in range(1, 20):
        before = transport.traffic.copy()
        worker.run(1)
        if step % 6:
            assert transport.traffic == before  # not one message
        else:
            assert transport.traffic.messages - before.messages == averages * sum(sent)
            collectives = transport.traffic.collectives - before.collectives
            assert collectives == (2 if buffers != "average" else 4)  # control, finite; layout of the momenta
            extra = transport.traffic.bytes_sent - before.bytes_sent - averages * elements * 8
            control = (CONTROL_MESSAGE_BYTES + 1) * (size - 1)  # and one truth value, all-gathered
            assert extra == control if buffers != "average" else control <= extra < control + 300 * size


def test_learning_rate_0_adopts_the_average_and_keeps_the_momentum(transport: Transport) -> None:
    """O19: finite, no division."""
    worker = slowmo(transport, QUADRATIC, lambda step: 0.1 if step < 4 else 0.0, 4, 4, slow_momentum=0.6)
    u, x = worker.slow_buffer().copy(), worker.model.x.copy()
    worker.run(4)
    assert_allclose(worker.model.x, x, **EXACT)
    assert_array_equal(worker.slow_buffer(), u)


@pytest.mark.parametrize("rate", [5e-324, 1e-310, 1e-39])
def test_learning_rate_too_small_to_divide_by_stays_finite(transport: Transport, rate: float) -> None:
    worker = slowmo(transport, QUADRATIC, lambda step: rate if step < 4 else 0.1, 8, 4, slow_momentum=0.6)
    assert np.isfinite(worker.model.x).all()
    assert np.isfinite(worker.slow_buffer()).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_non_finite_average_is_refused_on_every_rank_and_changes_nothing(
    transport: Transport, bad: float, algorithm: str
) -> None:
    gradient = reference.constant(DIMENSION)
    worker = Worker(
        transport,
        gradient,
        START,
        fixed(0.1),
        base=LocalSGD(),
        outer=SlowMomentum(1.0, 0.5),
        period=3,
        algorithm=algorithm,
    )
    worker.run(5)
    culprit = transport.size // 2
    if transport.rank == culprit:
        worker.model.x[DIMENSION - 2] = bad
    before = worker.model.x - 0.1 * gradient(transport.rank, 5, worker.model.x)
    with pytest.raises(NonFiniteError, match=rf"rank {culprit}: 'part1' is not finite"):
        worker.run(1)
    assert_array_equal(worker.model.x, before)


def test_sum_that_overflows_is_refused(transport: Transport) -> None:
    start = np.full(4, 3e38, np.float32)
    worker = Worker(transport, lambda *_: np.zeros(4), start, fixed(0.1), base=LocalSGD(), period=1)
    if transport.size == 1:
        assert np.isfinite(worker.run(1)).all()
    else:
        with pytest.raises(NonFiniteError, match="all parameters are finite"), np.errstate(over="ignore"):
            worker.run(1)


def test_different_settings_are_refused_on_every_rank(transport: Transport) -> None:
    last = transport.rank == transport.size - 1
    if transport.size == 1:
        return
    with pytest.raises(MismatchError, match=f"the settings differ.* period: .*: 4; rank {transport.size - 1}: 5"):
        Worker(transport, QUADRATIC, START, fixed(0.1), base=LocalSGD(), period=5 if last else 4)


class Doubling:
    """A schedule of a user's own, which says nothing about itself."""

    def __init__(self) -> None:
        self.now = 1

    def steps(self) -> int:
        return self.now

    def update(self, summary: Any) -> None:
        self.now *= 2

    def state_dict(self) -> dict[str, Any]:
        return {"now": self.now}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.now = state["now"]


def test_schedule_of_a_users_own_is_the_same_on_every_rank(transport: Transport) -> None:
    worker = Worker(transport, QUADRATIC, START, fixed(0.1), base=LocalSGD(), period=Doubling())
    everyone = everyones(transport, worker.run(7))
    assert worker.replica.rounds == 3
    assert (everyone == everyone[0]).all()


def test_rank_that_is_a_step_behind_is_named_on_every_rank(transport: Transport) -> None:
    if transport.size == 1:
        return
    worker = Worker(transport, QUADRATIC, START, fixed(0.1), base=AllReduce())
    worker.run(3)
    if transport.rank == 0:
        worker.replica.progress.inner_steps -= 1
    with pytest.raises(MismatchError, match="rank 0: averages the gradients of its model, after 2 steps"):
        worker.run(1)


def test_parameters_that_differ_at_the_first_step_are_noticed(transport: Transport) -> None:
    """Weights loaded after construction, but not on every rank."""
    if transport.size == 1:
        return
    worker = Worker(transport, QUADRATIC, START, fixed(0.1), base=LocalSGD(), period=2)
    if transport.rank == 1:
        worker.model.x += 1
    with pytest.raises(MismatchError, match="started from parameters with checksum") as raised:
        worker.run(2)
    assert "loaded or set after the optimizer was wrapped, and not on every rank" in str(raised.value)


def test_weights_loaded_before_the_first_step_are_the_anchor(transport: Transport) -> None:
    worker = Worker(transport, QUADRATIC, START, fixed(0.1), base=LocalSGD(), outer=SlowMomentum(0.5, 0.5), period=4)
    worker.model.x += 1
    worker.run(8)
    expected = reference.slowmo(transport.size, 8, START + 1, QUADRATIC, 4, fixed(0.1), alpha=0.5, beta=0.5)
    assert_allclose(worker.model.x, expected.x[transport.rank], **EXACT)


@pytest.mark.parametrize("taken", selected_cases([3, 4, 6], [*range(9)]))
def test_replica_resumes_bit_for_bit_at_any_step(transport: Transport, taken: int) -> None:
    """O20, for the replica's own state; tests of the frameworks add theirs."""
    make = {"base": LocalSGD(), "outer": SlowMomentum(0.9, 0.6), "period": 4}
    straight = Worker(transport, QUADRATIC, START, changing, **make)
    straight.run(taken)
    state, x = copy.deepcopy(straight.replica.state_dict()), straight.model.x.copy()
    straight.run(11)

    resumed = Worker(transport, QUADRATIC, np.zeros(DIMENSION), changing, **make)
    resumed.model.x[:] = x
    resumed.replica.load_state_dict(state)
    assert_array_equal(resumed.run(11), straight.model.x)
    assert_array_equal(resumed.slow_buffer(), straight.slow_buffer())


def test_averaged_shows_the_mean_and_gives_the_own_parameters_back(transport: Transport) -> None:
    worker = Worker(transport, QUADRATIC, START, fixed(0.1), base=LocalSGD(), period=100)
    own = worker.run(3).copy()
    with worker.replica.averaged():
        assert_allclose(worker.model.x, everyones(transport, own).mean(axis=0), **EXACT)
    assert_array_equal(worker.model.x, own)


# --- steps that the replica learns of later ----------------------------------------------------------------


@pytest.mark.parametrize("at_once", [1, 2, 3, 100])
def test_steps_reported_together_are_the_same_steps(transport: Transport, at_once: int) -> None:
    """As a graph does that counts automatically between outer steps; at any grain, also in the middle of a round."""
    counted = slowmo_worker(transport)
    assert_array_equal(counted.run_counted(22, at_once), slowmo_worker(transport).run(22))
    assert counted.replica.inner_steps == 22
    assert counted.replica.rounds == 5
    assert counted.replica.steps_until_due() == 2


def slowmo_worker(transport: Transport) -> Worker:
    rule = SlowMomentum(0.8, 0.6)
    return Worker(transport, QUADRATIC, START, lambda _: (0.125, 0.25), 0.5, base=LocalSGD(), outer=rule, period=4)


def test_state_of_other_shards_is_refused(transport: Transport) -> None:
    """As long as one's own, but of another place: ranks that share nodes otherwise cut the buffer otherwise."""
    worker = slowmo_worker(transport)
    state = worker.replica.state_dict()
    state["outer"]["anchors"]["starts"][0] += 1
    with pytest.raises(ConfigurationError, match=rf"rank {transport.rank} of .* placed otherwise on their nodes"):
        worker.replica.load_state_dict(state)


def test_more_steps_than_were_due_are_refused(transport: Transport) -> None:
    worker = slowmo_worker(transport)
    worker.replica.before_step()
    with pytest.raises(ConfigurationError, match="5 steps were reported at once, expected at least 1 and at most 4"):
        worker.replica.after_steps(5, [0.5, 0.5])


def test_replica_that_mixes_or_has_no_outer_step_says_when_it_must_be_called(transport: Transport) -> None:
    gossip = Worker(transport, QUADRATIC, START, fixed(0.1), base=SGP(), period=4)
    assert gossip.replica.steps_until_due() == 1
    alone = Worker(transport, QUADRATIC, START, fixed(0.1), base=AllReduce())
    assert alone.replica.steps_until_due() is None
