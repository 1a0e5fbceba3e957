"""Ranks whose values are not finite: named on every rank, or left out and restored; no other rank is affected."""

from typing import Any

import numpy as np
import pytest
import reference
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker

from lentando.comm.errors import ConfigurationError, MismatchError, NonFiniteError
from lentando.comm.objects import allgather_object
from lentando.comm.topology import OnePeerExponential, Ring, StaticExponential, Topology
from lentando.comm.transport import Array, Transport
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.push_sum import PushSum
from lentando.optimizers.rules.slow_momentum import SlowMomentum

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
EXACT = {"rtol": 1e-12, "atol": 1e-12}


def worker(transport: Transport, gradient: Any = QUADRATIC, momentum: float = 0.0, **settings: Any) -> Worker:
    loss = settings.pop("loss", None)
    return Worker(transport, gradient, START, lambda step: 0.1, momentum, loss, **settings)


def at(culprit: int, step: int, bad: float = np.nan, gradient: Any = QUADRATIC) -> Any:
    """``gradient``, of which one rank's last element is ``bad`` in one step."""

    def found(rank: int, now: int, x: Any) -> Any:
        values = gradient(rank, now, x)
        if (rank, now) == (culprit, step):
            values = values.copy()
            values[-1] = bad
        return values

    return found


def message_on_every_rank(transport: Transport, run: Any) -> str:
    """Of the ``NonFiniteError`` that ``run`` ends in."""
    with pytest.raises(NonFiniteError) as error:
        run()
    (message,) = set(allgather_object(transport, str(error.value).partition("\n")[0]))
    return str(message)


def slow_momentum(transport: Transport, of: Worker) -> Array:
    """All shards of it."""
    outer = of.replica.state_dict()["outer"]["slow_buffers"]
    whole = np.zeros(DIMENSION)
    for start, shard in allgather_object(transport, [outer["starts"][0], outer["flat"][0].tolist()]):
        whole[start : start + len(shard)] = shard
    return whole


# --- "raise" ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_gradient_is_named_before_it_is_averaged(transport: Transport, bad: float) -> None:
    culprit = transport.size - 1
    mine = worker(transport, at(culprit, 3, bad), 0.5, base=AllReduce())
    mine.run(3)
    before, momentum = mine.model.x.copy(), mine.model.momentum_buffer.copy()
    message = message_on_every_rank(transport, lambda: mine.run(1))
    assert message.startswith("average of gradients of inner step 4: not all values are finite")
    assert f"rank {culprit}: the gradient of 'part1' is not finite" in message
    assert_array_equal(mine.model.x, before)
    assert_array_equal(mine.model.momentum_buffer, momentum)


@pytest.mark.parametrize("base", [AllReduce(), LocalSGD(), SGP()])
def test_loss_is_named_with_the_parameter_next_to_it(transport: Transport, base: Any) -> None:
    culprit = transport.size - 1

    def loss(of: Worker) -> float:
        bad = of.rank == culprit and of.replica.inner_steps == 5
        if bad:
            of.model.x[-1] = np.inf
        return np.nan if bad else 1.0

    mine = worker(transport, base=base, period=3, loss=loss)
    mine.run(5)
    slow = mine.replica.state_dict()["outer"]
    message = message_on_every_rank(transport, lambda: mine.run(1))
    assert message.startswith("outer step 2: not all values are finite, so nothing was averaged.")
    assert "'part1' is not finite" in message
    assert "its loss is not finite" in message
    others = "all is finite" if transport.size > 1 and isinstance(base, LocalSGD) else ""
    assert others in message
    assert_array_equal(str(slow), str(mine.replica.state_dict()["outer"]))


def test_step_that_all_ranks_skip_for_an_overflow_is_no_error(transport: Transport) -> None:
    mine = worker(transport, base=AllReduce())
    mine.model.gradient[:] = np.inf if transport.rank == 0 else 1.0
    agreement = mine.replica.average_gradients(np.inf, has_overflowed=transport.rank == 0)
    assert agreement.overflowed == [0]


def test_scaled_gradients_are_their_scalers_affair(transport: Transport) -> None:
    mine = worker(transport, base=AllReduce())
    mine.model.gradient[:] = np.inf if transport.rank == 0 else 1.0
    mine.replica.average_gradients(np.nan, is_scaled=True)
    assert np.isinf(mine.model.gradient).all()


def test_between_outer_steps_nothing_is_looked_at_or_sent(transport: Transport) -> None:
    mine = worker(transport, at(0, 1), base=LocalSGD(), period=4, on_nonfinite="skip")
    before = transport.traffic.copy()
    mine.run(3)
    assert transport.traffic == before


# --- "skip" at outer steps and at averages of gradients -----------------------------------------------------


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
@pytest.mark.parametrize("buffers", ["reset", "maintain", "average"])
def test_average_is_that_of_the_finite_ranks_which_the_other_adopts(
    transport: Transport, algorithm: str, buffers: str, caplog: pytest.LogCaptureFixture
) -> None:
    if transport.size == 1:
        return
    rank, size = transport.rank, transport.size
    culprit, finite = size - 1, size - 1
    settings = {"outer": SlowMomentum(0.8, 0.6), "period": 3, "base_buffers": buffers, "algorithm": algorithm}
    constant = reference.constant(DIMENSION)
    mine = worker(transport, at(culprit, 4, gradient=constant), 0.5, base=LocalSGD(), on_nonfinite="skip", **settings)
    mine.run(3)
    x, u = mine.model.x.copy(), slow_momentum(transport, mine)
    mine.run(2)
    # What the outer step will find after one step more.
    before = mine.model.x - 0.1 * (0.5 * mine.model.momentum_buffer + constant(rank, 5, mine.model.x))
    momentum = 0.5 * mine.model.momentum_buffer + constant(rank, 5, mine.model.x)
    everyones, momenta = transport.allgather(before), transport.allgather(momentum)
    mine.run(1)
    mean = everyones[:finite].mean(axis=0)
    u = 0.6 * u + (x - mean) / 0.1
    assert_allclose(mine.model.x, x - 0.8 * 0.1 * u, **EXACT)
    assert (transport.allgather(mine.model.x) == mine.model.x).all()
    expected = momenta[:finite].mean(axis=0) if buffers == "average" else momentum
    if buffers == "reset" or (buffers == "maintain" and rank == culprit):
        expected = np.zeros(DIMENSION)
    assert_allclose(mine.model.momentum_buffer, expected, **EXACT)
    assert report_of(mine.replica)["left_out"] == (rank == culprit)
    reported = [record.message for record in caplog.records if "not finite" in record.message]
    assert len(reported) == (rank in (0, culprit))
    assert all("outer step 2: what is not finite was left out." in text for text in reported)
    assert all(f"rank {culprit}: 'part1' is not finite" in text for text in reported)
    mine.run(6)
    assert np.isfinite(transport.allgather(mine.model.x)).all()
    assert np.isfinite(mine.slow_buffer()).all()


def test_gradients_are_averaged_over_the_finite_ranks(transport: Transport, caplog: pytest.LogCaptureFixture) -> None:
    if transport.size == 1:
        return
    culprit = transport.size - 1
    mine = worker(transport, at(culprit, 3), 0.5, base=AllReduce(), on_nonfinite="skip")
    twin = reference.constant(DIMENSION)
    mine.gradient = at(culprit, 3, gradient=twin)
    mine.run(6)
    x, momentum = START.copy(), np.zeros(DIMENSION)
    for step in range(6):
        ranks = range(transport.size if step != 3 else culprit)
        momentum = 0.5 * momentum + np.mean([twin(rank, step, x) for rank in ranks], axis=0)
        x = x - 0.1 * momentum
    assert_allclose(mine.model.x, x, **EXACT)
    assert report_of(mine.replica)["left_out"] == (transport.rank == culprit)
    reported = [record.message for record in caplog.records if "not finite" in record.message]
    assert len(reported) == (transport.rank in (0, culprit))
    assert all(f"rank {culprit}: the gradient of 'part1' is not finite" in text for text in reported)


@pytest.mark.parametrize("base", [AllReduce(), LocalSGD()])
def test_no_finite_rank_is_an_error(transport: Transport, base: Any) -> None:
    def diverging(rank: int, step: int, x: Any) -> Any:
        return np.full(DIMENSION, np.nan if step == 4 else 1.0)

    mine = worker(transport, diverging, base=base, period=3, on_nonfinite="skip")
    message = message_on_every_rank(transport, lambda: mine.run(6))
    assert "no rank has finite values that could be averaged" in message


def test_parameters_that_no_outer_step_restores_are_an_error(transport: Transport) -> None:
    if transport.size == 1:
        return
    mine = worker(transport, base=AllReduce(), on_nonfinite="skip")
    mine.run(2)
    if transport.rank == 1:
        mine.model.x[0] = np.nan
    message = message_on_every_rank(transport, lambda: mine.run(1))
    assert "rank 1: 'part0' is not finite" in message
    assert "Give a period" in message


def test_with_a_period_an_outer_step_restores_them(transport: Transport) -> None:
    if transport.size == 1:
        return
    mine = worker(transport, base=AllReduce(), period=3, on_nonfinite="skip")
    mine.run(1)
    if transport.rank == 1:
        mine.model.x[0] = np.nan
    mine.run(2)
    assert np.isfinite(mine.model.x).all()
    assert (transport.allgather(mine.model.x) == mine.model.x).all()
    assert report_of(mine.replica)["left_out"] == (3 if transport.rank == 1 else 0)


@pytest.mark.parametrize("base", [AllReduce(), LocalSGD(), SGP(Ring())])
def test_rank_that_has_run_out_of_batches_takes_part(transport: Transport, base: Any) -> None:
    if transport.size < 3:
        return
    mine = worker(transport, at(0, 9), base=base, period=4, on_nonfinite="skip")
    mine.run_joined(12 if transport.rank < transport.size - 1 else 6)
    assert np.isfinite(mine.model.x).all()
    assert (transport.allgather(mine.model.x) == mine.model.x).all() or isinstance(base, SGP)


def test_loss_of_the_others_is_the_mean(transport: Transport) -> None:
    if transport.size == 1:
        return
    mine = worker(transport, base=AllReduce(), on_nonfinite="skip")
    mine.model.gradient[:] = 1.0
    agreement = mine.replica.average_gradients(np.nan if transport.rank == 0 else 3.0)
    assert agreement.loss == 3.0
    assert (mine.model.gradient == 1.0).all()


# --- "skip" in gossip ---------------------------------------------------------------------------------------

TOPOLOGIES = {"one peer": OnePeerExponential(), "static": StaticExponential(), "ring": Ring()}


def push_sum(of: Worker) -> PushSum:
    running = of.replica.base.steps
    assert isinstance(running, PushSum)
    return running


def still(rank: int, step: int, x: Any) -> Any:
    """Ranks that part in the first step and then only gossip."""
    return np.full(DIMENSION, float(rank + 1)) if step == 0 else np.zeros(DIMENSION)


def mixed(topology: Topology, size: int, steps: int, culprit: int, bad_step: int) -> Any:
    """De-biased parameters of every rank, by dense matrices."""
    graphs = topology.for_size(size)
    x, w = np.tile(START, (size, 1)), np.ones(size)
    for step in range(steps):
        x -= 0.1 * np.array([still(rank, step, None) for rank in range(size)])
        lost = 0.0
        if step == bad_step:
            lost, w[culprit], x[culprit] = w[culprit], 0, 0
        x, w = graphs.mixing_matrix(step) @ x, graphs.mixing_matrix(step) @ w
        if lost:
            x[culprit] *= (w[culprit] + lost) / w[culprit]
            w[culprit] += lost
    return x / w[:, None]


@pytest.mark.parametrize("topology", TOPOLOGIES.values(), ids=TOPOLOGIES)
@pytest.mark.parametrize("base", [SGP, DPSGD])
def test_rank_that_is_not_finite_is_restored_by_its_neighbours_shares(
    transport: Transport, topology: Topology, base: Any, caplog: pytest.LogCaptureFixture
) -> None:
    size, culprit = transport.size, transport.size - 1
    if size == 1:
        return
    mine = worker(transport, at(culprit, 4, gradient=still), base=base(topology), on_nonfinite="skip")
    for steps in (4, 5, 6, 20):
        mine.run(steps - mine.replica.inner_steps)
        assert_allclose(mine.model.x, mixed(topology, size, steps, culprit, 4)[transport.rank], rtol=1e-10)
        total = transport.allgather(np.array([push_sum(mine).weight])).sum()
        assert_allclose(total, size)  # so that averages stay averages
    with mine.replica.averaged():
        average = mine.model.x.copy()
    weights = transport.allgather(np.array([push_sum(mine).weight]))
    assert_allclose(average, (transport.allgather(mine.model.x) * weights).mean(axis=0))
    assert report_of(mine.replica)["left_out"] == (transport.rank == culprit)
    assert len([r for r in caplog.records if f"rank {culprit}: 'part1' is not finite" in r.message]) == (
        transport.rank == culprit
    )


@pytest.mark.parametrize("staleness", [1, 2])
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("step", [0, 5])
def test_overlapped_gossip_continues_without_it(
    transport: Transport, staleness: int, deterministic: bool, step: int
) -> None:
    """In the very first step no share is in flight yet, so that the rank waits for the next."""
    size = transport.size
    if size == 1:
        return
    base = OSGP(staleness=staleness, deterministic=deterministic)
    mine = worker(transport, at(size - 1, step), 0.5, base=base, on_nonfinite="skip")
    mine.run(20)
    assert np.isfinite(mine.model.x).all()
    mine.gradient = lambda *_: np.zeros(DIMENSION)
    mine.model.momentum = 0.0
    mine.run(60)
    mine.replica.setup.wait_in_flight()
    assert_allclose(transport.allgather(np.array([push_sum(mine).weight])).sum(), size)
    assert_allclose(transport.allgather(mine.model.x), np.tile(mine.model.x, (size, 1)), atol=1e-4)


def test_outer_step_over_gossip_notifies_rank_0_and_stays_exact(
    transport: Transport, caplog: pytest.LogCaptureFixture
) -> None:
    size, culprit = transport.size, transport.size - 1
    if size == 1:
        return
    mine = worker(transport, at(culprit, 1), base=SGP(), period=4, outer=SlowMomentum(), on_nonfinite="skip")
    mine.run(8)
    assert np.isfinite(mine.model.x).all()
    assert (transport.allgather(mine.model.x) == mine.model.x).all()
    reported = [r.message for r in caplog.records if "outer step 1" in r.message]
    assert len(reported) == (transport.rank in (0, culprit))
    assert all(f"rank {culprit}: 'part1' was not finite, and was restored by gossip" in text for text in reported)


def test_outer_step_leaves_out_ranks_that_no_neighbour_could_restore(transport: Transport) -> None:
    """On a ring, a rank whose two neighbours are lost in the same step has no rank to be restored by."""
    size = transport.size
    if size < 4:
        return

    def gradient(rank: int, step: int, x: Any) -> Any:
        return np.full(DIMENSION, np.nan if step == 3 and rank in (0, 1, 2) else float(rank))

    mine = worker(transport, gradient, base=SGP(Ring()), period=4, on_nonfinite="skip")
    mine.run(4)
    assert np.isfinite(mine.model.x).all()
    assert (transport.allgather(mine.model.x) == mine.model.x).all()
    mine.run(8)
    assert np.isfinite(mine.model.x).all()


def test_rank_that_no_rank_restores_gives_up(transport: Transport) -> None:
    def diverging(rank: int, step: int, x: Any) -> Any:
        return np.full(DIMENSION, np.nan if step >= 2 else 1.0)

    mine = worker(transport, diverging, base=SGP(Ring()), on_nonfinite="skip")
    with pytest.raises(NonFiniteError) as error:  # automatically: gossip has no message in which all could agree
        mine.run(100)
    assert f"parameters of rank {transport.rank} are not finite, and no neighbour has had finite ones" in str(
        error.value
    )


# --- settings -----------------------------------------------------------------------------------------------


def test_ranks_that_differ_in_it_get_an_error(transport: Transport) -> None:
    if transport.size == 1:
        return
    with pytest.raises(MismatchError, match=r"the settings differ between ranks. on_nonfinite: .*'skip'"):
        worker(transport, base=AllReduce(), on_nonfinite="skip" if transport.rank == 0 else "raise")


def test_a_run_may_continue_with_another_choice(transport: Transport) -> None:
    first = worker(transport, base=LocalSGD(), period=4)
    first.run(5)
    second = worker(transport, base=LocalSGD(), period=4, on_nonfinite="skip")
    second.model.x[:] = first.model.x
    second.replica.load_state_dict(first.replica.state_dict())
    assert_array_equal(first.run(7), second.run(7))


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"on_nonfinite": "ignore"}, "on_nonfinite must be one of 'raise', 'skip', got 'ignore'"),
        (
            {"on_nonfinite": "skip", "exact_average": False, "outer": SlowMomentum(), "period": 4, "base": SGP()},
            "exact_average=False forms none",
        ),
    ],
)
def test_impossible_settings_are_refused(transport: Transport, settings: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        worker(transport, **settings)
