"""AdaComm's rule: the paper's sequences of periods (oracles O30 to O38), alone and inside replicas."""

import copy
import json
import logging
from itertools import pairwise
from math import ceil, inf, nan, sqrt
from typing import Any

import numpy as np
import pytest
import reference
from case_selection import selected_cases
from hypothesis import given
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import Worker

from lentando.comm.errors import ConfigurationError, NonFiniteError
from lentando.comm.simulation import Compute, Network, SimulatedTransport, simulate
from lentando.comm.transport import Transport
from lentando.comm.transports.single import SingleTransport
from lentando.comm.transports.threads import run_ranks
from lentando.optimizers.methods import adacomm
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.adacomm import AdaptivePeriod
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.period import Period, PostLocal, RoundSummary
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.slow_momentum import SlowMomentum

LOSSES = [2.3, 1.15, 0.575, 0.56, 0.55, 0.2, 0.05]
BASIC = [20, 15, 10, 10, 10, 6, 3]
REFINED = [20, 15, 10, 5, 2, 1, 1]
START = np.linspace(-1, 1, 6)
QUADRATIC = reference.quadratic(6)
FREE = Network(0.0, inf)


def periods(schedule: AdaptivePeriod, losses: list[float], rates: list[float] | None = None) -> list[int]:
    """The period after each round of these losses, when every round ends an interval."""
    found, step = [], 0
    for number, loss in enumerate(losses, 1):
        step += schedule.steps()
        schedule.update(RoundSummary(number, step, loss, 0.1 if rates is None else rates[number - 1], float(step)))
        found.append(schedule.steps())
    return found


def every_round(initial_period: int = 20, **options: Any) -> AdaptivePeriod:
    return AdaptivePeriod(initial_period, interval_steps=1, **options)


# --- the formula --------------------------------------------------------------------------------------------


def test_basic_rule() -> None:
    """O30, and O34: the initial period is outside the root."""
    assert periods(every_round(refined=False), LOSSES) == BASIC
    assert periods(every_round(refined=False), [1.0, 1.0]) == [20, 20]
    assert periods(every_round(19, refined=False), [1.0, 0.25]) == [19, 10]
    assert periods(every_round(refined=False), [1.0, 1e-9]) == [20, 1]


def test_refined_rule_halves_on_a_plateau() -> None:
    """O31."""
    assert periods(every_round(), LOSSES) == REFINED
    assert periods(every_round(100), [1.0] * 9) == [100, 50, 25, 12, 6, 3, 1, 1, 1]


@pytest.mark.parametrize(("exponent", "factor"), [(1, 3.162), (3, 31.62)])
def test_smaller_learning_rate_lengthens_the_period(exponent: Any, factor: float) -> None:
    """O32, with refinement too: a change of the learning rate is no plateau."""
    for refined in (False, True):
        schedule = every_round(1000, refined=refined, learning_rate_exponent=exponent)
        assert periods(schedule, [1.0, 1.0], [0.1, 0.01])[1] == pytest.approx(1000 * factor, rel=1e-3)


def test_published_sequences_with_a_learning_rate_decay() -> None:
    rates = [0.1] * 5 + [0.01] * 2
    assert periods(every_round(refined=False), LOSSES, rates) == [20, 15, 10, 10, 10, 19, 10]
    assert periods(every_round(refined=False, learning_rate_exponent=3), LOSSES, rates)[5:] == [187, 94]
    assert periods(every_round(), LOSSES, rates) == [20, 15, 10, 5, 2, 19, 10]
    assert periods(every_round(max_period=12, initial_period=12), LOSSES, rates)[5:] == [12, 6]


def test_mean_of_equal_learning_rates_is_no_change() -> None:
    """0.1 + 0.1 + 0.1 is not 0.3: what differs in the last bits neither skips a halving nor adds a step."""
    rates = [0.1, 0.30000000000000004 / 3, 0.1, 0.7 / 7, 0.09999999999999999, 0.1, 0.1]
    assert periods(every_round(), LOSSES, rates) == REFINED
    assert periods(every_round(refined=False), LOSSES, rates) == BASIC


@given(
    losses=st.lists(st.floats(1e-3, 1e3), min_size=2, max_size=12),
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-10, 10),
    initial=st.integers(1, 200),
)
def test_rule_is_free_of_scale_and_shift(losses: list[float], scale: float, shift: float, initial: int) -> None:
    """O33. A value within rounding of an integer may fall to either side: the formula decides where it is not."""
    factors = [sqrt(loss / losses[0]) * initial * (1 - 1e-6) for loss in losses]
    if any(abs(factor - round(factor)) < 1e-6 * factor for factor in factors):
        return
    expected = [initial, *(max(1, ceil(factor)) for factor in factors[1:])]
    assert periods(every_round(initial, refined=False), losses) == expected
    assert periods(every_round(initial, refined=False), [scale * loss for loss in losses]) == expected
    shifted = every_round(initial, refined=False, loss_floor=1000 * shift)
    assert periods(shifted, [1000 * (loss + shift) for loss in losses])[-1] == pytest.approx(expected[-1], abs=1)


@given(losses=st.lists(st.floats(-1, 1e6), max_size=30), initial=st.integers(2, 500), least=st.integers(1, 2))
def test_refined_periods_never_grow_and_stay_at_the_least(losses: list[float], initial: int, least: int) -> None:
    """O31, O35: whatever the loss does."""
    found = [initial, *periods(every_round(initial, min_period=least), [1.0, *losses])]
    assert found == sorted(found, reverse=True)
    assert found[-1] >= least
    assert all(later < earlier or later == least for earlier, later in pairwise(found[1:]))


# --- intervals ----------------------------------------------------------------------------------------------


def test_period_changes_at_the_first_end_of_a_round_after_each_interval() -> None:
    """O36, by a fake clock: 10 s after the end of the first round, which shows the loss at the start, and so on."""
    schedule = AdaptivePeriod(8, interval_seconds=10.0, refined=False)
    clocks = [100.0, 105.0, 109.9, 110.0, 119.0, 121.0, 129.9, 130.5]
    decided = []
    for number, clock in enumerate(clocks, 1):
        decision = schedule.update(RoundSummary(number, 8 * number, 0.25 if number > 1 else 1.0, 0.1, clock))
        decided += [] if decision is None else [decision.clock]
    assert decided == [110.0, 121.0, 130.5]


def test_long_round_ends_several_intervals_at_once() -> None:
    schedule = AdaptivePeriod(8, interval_seconds=10.0)
    decided = [schedule.update(RoundSummary(n, n, 1.0, 0.1, clock)) for n, clock in enumerate([0.0, 35.0, 39.0, 41.0])]
    assert [d is not None for d in decided] == [False, True, False, True]


def test_loss_is_the_mean_over_the_steps_of_an_interval() -> None:
    schedule = PostLocal(0, AdaptivePeriod(100, interval_steps=200, refined=False))
    assert schedule.update(RoundSummary(1, 100, 4.0, 0.1, 0.0)) is None
    assert schedule.update(RoundSummary(2, 200, 1.5, 0.1, 0.0)) is None
    first = schedule.update(RoundSummary(3, 300, 0.5, 0.1, 0.0))
    assert first is not None
    assert (first.loss, first.period, first.step, first.round, schedule.steps()) == (1.0, 50, 300, 3, 50)
    for number in (4, 5, 6):
        assert schedule.update(RoundSummary(number, 150 + 50 * number, 0.1, 0.1, 0.0)) is None
    second = schedule.update(RoundSummary(7, 500, 0.7, 0.1, 0.0))
    assert second is not None
    assert second.loss == pytest.approx(0.25)  # not of the last round alone, and nothing of the interval before


def test_rounds_of_different_length_count_by_their_steps() -> None:
    schedule = AdaptivePeriod(30, interval_steps=35, refined=False)
    schedule.update(RoundSummary(1, 30, 1.0, 0.1, 0.0))
    schedule.update(RoundSummary(2, 60, 1.0, 0.1, 0.0))
    schedule.load_state_dict({**schedule.state_dict(), "period": 10})
    decision = schedule.update(RoundSummary(3, 70, 0.2, 0.1, 0.0))
    assert decision is not None
    assert decision.loss == pytest.approx((30 * 1.0 + 10 * 0.2) / 40)


# --- losses and learning rates that are no good -------------------------------------------------------------


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_rounds_without_a_finite_loss_do_not_count(bad: float) -> None:
    """O35: not for the loss at the start, not for an interval's; an interval waits for one that does."""
    assert periods(every_round(refined=False), [bad, *LOSSES]) == [20, *BASIC]
    assert periods(every_round(refined=False), [1.0, bad, bad, 0.25]) == [20, 20, 20, 10]
    schedule = AdaptivePeriod(4, interval_steps=8, refined=False)
    assert periods(schedule, [1.0, bad, 0.25])[-1] == 2


def test_loss_at_the_floor_is_the_least_period() -> None:
    assert periods(every_round(loss_floor=0.5, min_period=3), [2.0, 0.5]) == [20, 3]
    assert periods(every_round(), [2.0, -7.0]) == [20, 1]


@pytest.mark.parametrize("first", [0.0, -1.0, 0.2])
def test_first_loss_must_be_above_the_floor(first: float) -> None:
    with pytest.raises(ConfigurationError, match=rf"loss_floor=0.2, but the first round's mean loss is {first:g}"):
        periods(every_round(loss_floor=0.2), [first])


def test_learning_rate_of_zero_teaches_nothing() -> None:
    """Neither as the first, which a warm-up begins with, nor later."""
    assert periods(every_round(refined=False), [9.0, 1.0, 0.25], [0.0, 0.1, 0.1]) == [20, 20, 10]
    assert periods(every_round(), [1.0, 0.25, 0.25, 0.25], [0.1, 0.1, 0.0, 0.1]) == [20, 10, 10, 5]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"initial_period": 0}, "initial_period must be an integer >= 1"),
        ({"initial_period": 2.5}, "initial_period"),
        ({"interval_seconds": 0.0}, "interval_seconds must be > 0, got 0.0"),
        ({"interval_seconds": nan}, "interval_seconds"),
        ({"interval_seconds": "60"}, "interval_seconds"),
        ({"interval_steps": 0}, "interval_steps must be an integer >= 1"),
        ({"interval_steps": 1.5}, "interval_steps"),
        ({"learning_rate_exponent": 2}, "learning_rate_exponent must be 1 or 3, got 2"),
        ({"loss_floor": inf}, "loss_floor must be a finite number"),
        ({"min_period": 0}, "min_period must be an integer >= 1"),
        ({"max_period": 15}, "initial_period must be from min_period=1 to max_period=15, got 16"),
        ({"min_period": 17}, "initial_period must be from min_period=17"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        AdaptivePeriod(**options)


def test_without_exact_average_it_is_refused() -> None:
    """There each rank would decide by its own loss and clock."""
    for period in (AdaptivePeriod(), PostLocal(5, AdaptivePeriod())):
        with pytest.raises(ConfigurationError, match="with exact_average=False every rank would decide by its own"):
            Settings(LocalSGD(), SlowMomentum(), period, exact_average=False)
    assert Settings(LocalSGD(), SlowMomentum(), PostLocal(5, 4), exact_average=False).make_period() is not None


# --- in replicas --------------------------------------------------------------------------------------------


def own_loss(of_round: list[float]) -> Any:
    """Losses that only their mean over ranks reports: each rank's own say something else, even in their order."""

    def loss(worker: Worker) -> float:
        size = worker.replica.transport.size
        mean = of_round[min(worker.replica.rounds, len(of_round) - 1)]
        wobble = (-1) ** worker.replica.inner_steps * 0.125 * (worker.replica.period % 2 == 0)
        return mean + 100.0 * (worker.rank - (size - 1) / 2) * (-1) ** worker.replica.rounds + wobble

    return loss


def train(transport: Transport, steps: int, loss: Any, rates: Any = lambda _: 0.05, **settings: Any) -> Worker:
    worker = Worker(transport, QUADRATIC, START, rates, loss=loss, **{"base": LocalSGD(), **settings})
    worker.run(steps)
    return worker


def decided(worker: Worker) -> list[int]:
    return [decision["period"] for decision in report_of(worker.replica)["decisions"]]


@pytest.mark.slow
@pytest.mark.parametrize(("refined", "expected"), [(False, BASIC), (True, REFINED)])
@pytest.mark.parametrize("base", [LocalSGD(), SGP(), OSGP(), DPSGD(), AllReduce()], ids=repr)
@pytest.mark.parametrize("size", selected_cases([1, 5], [1, 2, 5]))
def test_replicas_that_see_different_losses_decide_alike(size: int, base: Any, refined: bool, expected: Any) -> None:
    """O30, O31, O35: the paper's sequence on every rank, over any base algorithm, with or without slow momentum."""
    steps = sum(expected) + 20  # the first period lasts two rounds
    for outer in (None, SlowMomentum(1.0, 0.3)):
        settings = {"base": base, "outer": outer, "period": every_round(refined=refined)}

        def work(transport: Transport, settings: dict[str, Any] = settings) -> Worker:
            return train(transport, steps, own_loss(LOSSES), **settings)

        workers = run_ranks(size, work)
        for worker in workers:
            assert [20, *decided(worker)[: len(expected) - 1]] == expected
            assert report_of(worker.replica)["decisions"] == report_of(workers[0].replica)["decisions"]


def test_replicas_at_different_learning_rates_decide_alike() -> None:
    """As a scheduler that goes by each rank's own loss sets them."""

    def work(transport: Transport) -> list[int]:
        rate = 0.1 / 10**transport.rank

        def rates(step: int) -> float:
            return rate * 0.5 ** (step // 10)

        return decided(train(transport, 60, lambda _: 1.0, rates, period=every_round(4)))

    found = run_ranks(3, work)
    assert found[0] == found[1] == found[2]
    assert max(found[0]) > 4


@pytest.mark.parametrize("bad", [nan, inf, -inf])
def test_loss_of_one_rank_that_is_not_a_number_is_an_error_or_left_out_of_the_mean(bad: float) -> None:
    def loss(worker: Worker) -> float:
        broken = worker.rank == 1 and worker.replica.rounds == 1
        return bad if broken else (1.0 if worker.replica.rounds == 0 else 0.25)

    def refused(transport: Transport) -> str:
        with pytest.raises(NonFiniteError) as error:
            train(transport, 12, loss, period=every_round(4, refined=False))
        return str(error.value)

    def left_out(transport: Transport) -> list[int]:
        return decided(train(transport, 8, loss, period=every_round(4, refined=False), on_nonfinite="skip"))

    (message,) = set(run_ranks(3, refused))
    assert message.startswith("outer step 2: not all values are finite, so nothing was averaged. ranks 0 and 2: all is")
    assert "rank 1: its loss is not finite" in message
    assert run_ranks(3, left_out) == [[2]] * 3


def test_round_in_which_no_rank_has_a_finite_loss_decides_nothing() -> None:
    def work(transport: Transport) -> list[int]:
        def loss(worker: Worker) -> float:
            return {0: 1.0, 1: nan}.get(worker.replica.rounds, 0.25)

        return decided(train(transport, 12, loss, period=every_round(4, refined=False), on_nonfinite="skip"))

    assert run_ranks(3, work) == [[2]] * 3


@pytest.mark.parametrize("missing", [0, 1, 5])
def test_step_without_its_loss_is_an_error_at_once(missing: int) -> None:
    def loss(worker: Worker) -> float:
        if worker.replica.inner_steps == missing:
            worker.loss = None
        return 1.0

    with pytest.raises(ConfigurationError, match=rf"inner step {missing + 1 + (missing > 0)} on rank 0 came without"):
        train(SingleTransport(), 20, loss if missing else None, period=PostLocal(2, every_round(4)))


def test_periods_that_do_not_need_the_loss_take_steps_without() -> None:
    assert train(SingleTransport(), 8, None, period=PostLocal(2, 3)).replica.rounds == 4


def test_endless_interval_is_local_sgd_and_period_1_synchronous_sgd() -> None:
    """O37."""

    def work(transport: Transport) -> None:
        adaptive = train(transport, 25, own_loss(LOSSES), period=AdaptivePeriod(4, inf))
        assert_array_equal(adaptive.model.x, train(transport, 25, None, period=4).model.x)
        single = train(transport, 20, own_loss(LOSSES), period=AdaptivePeriod(1, interval_steps=3))
        assert_allclose(single.model.x, train(transport, 20, None, base=AllReduce()).model.x, rtol=1e-12)

    run_ranks(3, work)


def test_block_momentum_is_slowmo_between_decisions() -> None:
    """O38: the named setting clears the workers' momentum at each average, as the paper does."""

    def work(transport: Transport) -> None:
        settings = adacomm(initial_period=4, interval_seconds=inf, slow_momentum=0.3)
        block = train(transport, 25, own_loss(LOSSES), momentum=0.9, **vars(settings))
        expected = reference.slowmo(
            transport.size, 25, START, QUADRATIC, 4, lambda _: 0.05, 1.0, 0.3, 0.9, buffers="reset"
        )
        assert_allclose(block.model.x, expected.x[transport.rank], rtol=1e-12)

    run_ranks(3, work)


def test_named_setting() -> None:
    assert adacomm() == Settings(LocalSGD(), None, AdaptivePeriod(16, 60.0), "maintain")
    slow = adacomm(base=SGP(), slow_momentum=0.3, warmup_steps=50, interval_steps=100, initial_period=8, max_period=64)
    period = PostLocal(50, AdaptivePeriod(8, interval_steps=100, max_period=64))
    assert slow == Settings(SGP(), SlowMomentum(1.0, 0.3), period, "auto")
    assert adacomm(slow_momentum=0.3, base_buffers="maintain").base_buffers == "maintain"
    assert isinstance(AdaptivePeriod(), Period)


def test_warm_up_is_left_out_of_the_loss_at_the_start() -> None:
    """A learning rate that grows from 0 would otherwise shorten every period."""
    rates = [0.0, 0.02, 0.04, *[0.05] * 100]
    losses = [50.0, 40.0, 30.0, *LOSSES]
    settings = adacomm(warmup_steps=3, initial_period=20, interval_steps=1)
    worker = train(SingleTransport(), 80, own_loss(losses), lambda step: rates[step], **vars(settings))
    assert [20, *decided(worker)][:6] == REFINED[:6]
    assert report_of(worker.replica)["decisions"][0]["step"] == 3 + 20 + 20


def test_decisions_are_logged_once_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "lentando"):
        (worker, _) = run_ranks(2, lambda t: train(t, 120, own_loss(LOSSES), period=every_round()))
    lines = [record.getMessage() for record in caplog.records if "training loss" in record.getMessage()]
    assert lines[0].startswith("period 15 after 20, from inner step 40 on (")
    assert lines[0].endswith("s): training loss 1.15, learning rate 0.05")
    decisions = report_of(worker.replica)["decisions"]
    assert len(lines) == len(decisions)
    assert {name: value for name, value in decisions[0].items() if name != "clock"} == {
        "round": 2,
        "step": 40,
        "loss": pytest.approx(1.15),
        "learning_rate": pytest.approx(0.05),
        "period": 15,
    }


# --- virtual time, stopping and resuming --------------------------------------------------------------------


def falling(worker: Worker) -> float:
    """A loss that falls with the steps, another on each rank."""
    return (1 + worker.rank) * 0.97**worker.replica.inner_steps


@pytest.mark.slow
def test_intervals_go_by_rank_0s_virtual_clock_whatever_the_others_say() -> None:
    """Ranks that compute for different times, so that no two clocks agree when a round ends."""
    compute = Compute(0.1, "exponential", stragglers={3: 1.7})

    def work(transport: SimulatedTransport) -> tuple[list[dict[str, Any]], Any]:
        worker = train(transport, 300, falling, period=AdaptivePeriod(16, interval_seconds=3.0))
        return report_of(worker.replica)["decisions"], worker.model.x

    results = simulate(work, 4, network=Network(0.01, 1e6), compute=compute)
    for decisions, x in results:
        assert decisions == results[0][0]
        assert_array_equal(x, results[0][1])
    clocks = [decision["clock"] for decision in results[0][0]]
    assert len(clocks) > 5
    assert [decision["period"] for decision in results[0][0]][-1] == 1
    assert (clocks[-1] - clocks[0]) / (len(clocks) - 1) == pytest.approx(3.0, rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("outer", [None, SlowMomentum(1.0, 0.4)])
@pytest.mark.parametrize("period", [AdaptivePeriod(7, 1.03), PostLocal(3, AdaptivePeriod(7, interval_steps=10))])
def test_resumed_at_any_step_it_decides_the_same(period: Any, outer: Any) -> None:
    """In the middle of an interval and of a round too, though each process's clock starts from another moment."""
    steps = 70

    def work(transport: SimulatedTransport) -> tuple[list[Any], Any, list[tuple[str, Any, Any]]]:
        worker = train(transport, 0, falling, period=period, outer=outer)
        saved = []
        for _ in range(steps):
            state = worker.replica.state_dict()
            arrays = state.pop("outer"), worker.model.x.copy()
            saved.append((json.dumps(state), copy.deepcopy(arrays[0]), arrays[1]))
            worker.run(1)
        return report_of(worker.replica)["decisions"], worker.model.x.copy(), saved

    whole = simulate(work, 3, network=FREE, compute=Compute(0.1))
    assert len(whole[0][0]) > 3
    for taken in range(0, steps, 2):

        def resume(transport: SimulatedTransport, taken: int = taken) -> tuple[list[Any], Any]:
            transport.compute(100.0)  # the clock says something else
            worker = train(transport, 0, falling, period=period, outer=outer)
            transport.compute(33.0)
            state, arrays, x = whole[transport.rank][2][taken]
            worker.replica.load_state_dict({**json.loads(state), "outer": arrays})
            worker.model.x[:] = x
            worker.run(steps - taken)
            return report_of(worker.replica)["decisions"], worker.model.x

        for (decisions, x, _), (again, resumed) in zip(
            whole, simulate(resume, 3, network=FREE, compute=Compute(0.1)), strict=True
        ):
            assert_array_equal(x, resumed)
            assert [{**d, "clock": pytest.approx(d["clock"])} for d in decisions] == again
