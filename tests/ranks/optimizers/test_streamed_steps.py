"""Outer steps with delay, fragments and blend, between a replica on each rank and references of a few lines."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import reference
from case_selection import selected_cases
from numpy.testing import assert_allclose, assert_array_equal
from numpy_model import NumpyModel, Worker

from lentando.comm.errors import ConfigurationError, MismatchError, NonFiniteError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.simulation import simulate
from lentando.comm.transport import Array, Transport
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.state import copied
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.adacomm import AdaptivePeriod
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.co2_momentum import CO2Momentum
from lentando.optimizers.rules.gossip import SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.period import Decision, RoundSummary
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.optimizers.rules.streamed_step import StreamedOuterStep

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
EXACT = {"rtol": 0, "atol": 1e-13}
PERIOD = 4


def changing(step: int) -> float:
    return 0.05 + 0.02 * (step % 7)


def trained(transport: Transport, steps: int, base: BaseAlgorithm = LocalSGD(), **settings: Any) -> Worker:
    momentum = settings.pop("momentum", 0.0)
    settings = {"period": PERIOD, "outer": SlowMomentum(0.8, 0.5), **settings}
    worker = Worker(transport, QUADRATIC, START, changing, momentum, base=base, **settings)
    worker.run(steps)
    return worker


def everyones(transport: Transport, array: Array) -> Array:
    return transport.allgather(np.ascontiguousarray(array))


@pytest.mark.parametrize("delay", [1, PERIOD, *selected_cases([], [3])])
@pytest.mark.parametrize("buffers", ["reset", "maintain"])
@pytest.mark.parametrize(
    ("nesterov", "blend"), [(False, 0.25), (True, None), *selected_cases([], [(False, None), (True, 0.25)])]
)
def test_slowmo_with_delay_equals_the_reference(
    transport: Transport, delay: int, nesterov: bool, buffers: str, blend: float | None
) -> None:
    settings = {"outer": SlowMomentum(0.8, 0.6, nesterov), "base_buffers": buffers, "delay": delay, "blend": blend}
    worker = trained(transport, 4 * PERIOD + 3, momentum=0.5, **settings)
    expected = reference.delayed_slowmo(
        transport.size,
        4 * PERIOD + 3,
        START,
        QUADRATIC,
        PERIOD,
        changing,
        0.8,
        0.6,
        0.5,
        buffers,
        nesterov,
        delay,
        blend,
    )
    assert_allclose(everyones(transport, worker.model.x), expected, **EXACT)


@pytest.mark.parametrize(("penalty", "clip", "beta"), [(2.0, 0.9, 0.6), (1.5, None, 0.0)])
def test_co2_equals_the_reference(transport: Transport, penalty: float, clip: float | None, beta: float) -> None:
    """Averages that are a round old, their penalty, and momenta that are clipped, some of them."""
    steps = 5 * PERIOD + 1
    outer = CO2Momentum(0.8, beta, gap_penalty=penalty, momentum_clip=clip)
    worker = trained(transport, steps, outer=outer, delay=PERIOD)
    expected = reference.delayed_slowmo(
        transport.size, steps, START, QUADRATIC, PERIOD, changing, 0.8, beta, 0.0, "reset", False, PERIOD, None,
        gap_penalty=penalty, momentum_clip=np.inf if clip is None else clip,
    )  # fmt: skip
    assert_allclose(everyones(transport, worker.model.x), expected, **EXACT)
    if clip is not None:
        assert worker.replica.setup.outer is not None
        momenta = np.abs(worker.replica.setup.outer.state_dict()["slow_buffers"]["flat"][0])
        assert momenta.max() == clip
        assert momenta.min() < clip


FIRST_WITH_CHOSEN_DELAY = 5
"""The outer step whose control message carries three measured averages after the first one of every rank."""


def test_a_delay_that_is_chosen_equals_the_reference(transport: Transport) -> None:
    """Whole rounds until all ranks have measured enough, and from then on the same number of steps on all."""
    steps = 8 * PERIOD + 3
    worker = trained(transport, (FIRST_WITH_CHOSEN_DELAY - 1) * PERIOD + 1, delay="auto")
    outer = worker.replica.setup.outer
    assert isinstance(outer, StreamedOuterStep)
    assert report_of(worker.replica)["delay"] is None
    worker.run(steps - worker.replica.inner_steps)
    report = report_of(worker.replica)
    chosen = report["delay"]
    assert set(everyones(transport, np.array([chosen])).flat) == {chosen}
    assert 0 <= chosen <= PERIOD
    assert chosen == 0 or outer.is_overlapped
    assert report["average_seconds"] > 0
    expected = reference.delayed_slowmo(
        transport.size, steps, START, QUADRATIC, PERIOD, changing, 0.8, 0.5, 0.0, "reset", False,
        lambda number: chosen if number >= FIRST_WITH_CHOSEN_DELAY else PERIOD, None,
    )  # fmt: skip
    assert_allclose(everyones(transport, worker.model.x), expected, **EXACT)


@pytest.mark.parametrize("settings", [{}, {"fragments": 2}, {"fragments": 2, "blend": 0.5}], ids=str)
def test_a_chosen_delay_continues_bit_identically(
    transport: Transport, settings: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """From a state of the round before the choice on. From earlier ones, the choice falls into the same round."""
    caplog.set_level("INFO", "lentando")
    worker = trained(transport, 0, delay="auto", **settings)
    saved: list[tuple[Array, dict[str, Any]]] = []
    for _ in range(7 * PERIOD):
        saved.append((worker.model.x.copy(), copied(worker.replica.state_dict())))
        worker.run(1)
    measured = (FIRST_WITH_CHOSEN_DELAY - 1) * PERIOD + 1  # from here on, all averages that count are in the state
    every = selected_cases(3, 1)  # so that each step of a round is among them
    for step in (1, PERIOD, 2 * PERIOD + 1, *range(measured, 7 * PERIOD, every)):
        x, state = saved[step]
        resumed = trained(transport, 0, delay="auto", **settings)
        resumed.model.x[:] = x
        resumed.replica.load_state_dict(state)
        if step < measured:
            resumed.run((FIRST_WITH_CHOSEN_DELAY - 1) * PERIOD - step)
            assert report_of(resumed.replica)["delay"] is None
            resumed.run(PERIOD)
            delays = everyones(transport, np.array([report_of(resumed.replica)["delay"]], float))
            assert set(delays.flat) <= set(range(PERIOD + 1))
            assert len(set(delays.flat)) == 1
            continue
        resumed.run(7 * PERIOD - step)
        assert report_of(resumed.replica)["delay"] == report_of(worker.replica)["delay"]
        assert_array_equal(resumed.model.x, worker.model.x)
    choices = [record.getMessage() for record in caplog.records if "an inner step" in record.getMessage()]
    assert bool(choices) == (transport.rank == 0)
    assert not any("nan" in choice for choice in choices)  # where the first step after a resumption ends the round, too


@pytest.mark.parametrize("settings", [{"delay": 0, "blend": 0.0}, {"delay": 0, "blend": 0.0, "base_buffers": "reset"}])
def test_a_blend_of_0_without_delay_is_slowmo_bit_identically(transport: Transport, settings: Any) -> None:
    """The same rule by the other implementation: whole anchors, contributions, and adoption at once."""
    plain = {name: value for name, value in settings.items() if name == "base_buffers"}
    for algorithm in ("ring", "backend"):
        expected = trained(transport, 3 * PERIOD + 1, momentum=0.5, algorithm=algorithm, **plain)
        found = trained(transport, 3 * PERIOD + 1, momentum=0.5, algorithm=algorithm, **settings)
        assert isinstance(found.replica.setup.outer, StreamedOuterStep)
        assert not isinstance(expected.replica.setup.outer, StreamedOuterStep)
        assert_array_equal(found.model.x, expected.model.x)


@pytest.mark.parametrize("outer", [OuterSGD(0.7, 0.9, nesterov=True), OuterSGD(0.5, 0.0, nesterov=False), None])
def test_diloco_with_delay_in_fragments_equals_the_reference(transport: Transport, outer: Any) -> None:
    """Each of the two parameters is a fragment, due in the middle and at the end of the round."""
    worker = trained(transport, 5 * PERIOD + 1, outer=outer, delay=1, fragments=2)
    lr, momentum = (1.0, 0.0) if outer is None else (outer.lr, outer.momentum)
    expected = reference.streaming_diloco(
        transport.size,
        5 * PERIOD + 1,
        START,
        QUADRATIC,
        changing,
        [(slice(0, DIMENSION // 2), 2), (slice(DIMENSION // 2, None), PERIOD)],
        PERIOD,
        delay=1,
        outer_lr=lr,
        outer_momentum=momentum,
        nesterov=outer is not None and outer.nesterov,
    )
    assert_allclose(everyones(transport, worker.model.x), expected, **EXACT)


@pytest.mark.parametrize("pullback", [0.25, 1.0])
def test_a_blend_without_momentum_is_overlap_local_sgd(transport: Transport, pullback: float) -> None:
    """arXiv 2002.09539: at each round's end x <- x - a (x - z), where z is the average that the round before began."""
    worker = trained(transport, 4 * PERIOD, outer=None, delay=PERIOD, blend=1 - pullback)
    x = np.tile(START, (transport.size, 1))
    anchor = START
    for step in range(4 * PERIOD):
        x = x - changing(step) * np.array([QUADRATIC(rank, step, own) for rank, own in enumerate(x)])
        if (step + 1) % PERIOD == 0:
            if step >= PERIOD:
                x = x - pullback * (x - anchor)
            anchor = x.mean(axis=0)
    assert_allclose(everyones(transport, worker.model.x), x, **EXACT)


class FirstRound:
    """A first round of another length than the others."""

    decides_alike = True

    def __init__(self, first: int, others: int) -> None:
        self._first, self._others, self._rounds = first, others, 0

    def describe(self) -> list[int]:
        return [self._first, self._others]

    def steps(self) -> int:
        return self._others if self._rounds else self._first

    def update(self, summary: RoundSummary) -> Decision | None:
        self._rounds += 1
        return None

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self._rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._rounds = state["rounds"]


class TwoScalars(NumpyModel):
    """Two layers of one weight each."""

    def __init__(self) -> None:
        super().__init__(np.ones(2, np.float32), (1.0, 1.0))
        (layout,) = build_layouts([Entry(f"layers.{number}.weight", (1, 1), "float32", 0) for number in range(2)])
        self.buffers: Sequence[FlatBuffer] = [FlatBuffer(layout, self.x)]
        self.rates = [1.0]

    def step(self) -> None:
        self.x -= 2.0

    def reset_optimizer(self) -> None:
        raise AssertionError("DiLoCo keeps the state of the inner optimizer")


TRACES: Mapping[tuple[int, float], tuple[list[float], list[float]]] = {
    (0, 0.0): (
        [1, -1, -3, -11, -13, -15, -17, -19, -21, -35, -37, -39, -41, -43, -45, -59],
        [1, -1, -3, -5, -7, -9, -23, -25, -27, -29, -31, -33, -47, -49, -51, -53],
    ),
    (0, 0.5): (
        [1, -1, -3, -8, -10, -12, -14, -16, -18, -24.5, -26.5, -28.5, -30.5, -32.5, -34.5, -40.25],
        [1, -1, -3, -5, -7, -9, -17, -19, -21, -23, -25, -27, -32, -34, -36, -38],
    ),
    (0, 1.0): (
        [1, -1, -3, -5, -7, -9, -11, -13, -15, -17, -19, -21, -23, -25, -27, -29],
        [1, -1, -3, -5, -7, -9, -11, -13, -15, -17, -19, -21, -23, -25, -27, -29],
    ),
    (1, 0.0): (
        [1, -1, -3, -7, -9, -11, -13, -15, -17, -27, -29, -31, -33, -35, -37, -47],
        [1, -1, -3, -5, -7, -9, -19, -21, -23, -25, -27, -29, -39, -41, -43, -45],
    ),
    (1, 0.5): (
        [1, -1, -3, -6, -8, -10, -12, -14, -16, -21.5, -23.5, -25.5, -27.5, -29.5, -31.5, -35.75],
        [1, -1, -3, -5, -7, -9, -15, -17, -19, -21, -23, -25, -29, -31, -33, -35],
    ),
    (1, 1.0): (
        [1, -1, -3, -5, -7, -9, -11, -13, -15, -17, -19, -21, -23, -25, -27, -29],
        [1, -1, -3, -5, -7, -9, -11, -13, -15, -17, -19, -21, -23, -25, -27, -29],
    ),
}
"""The weights of both layers before each of 16 steps, by delay and blend: the values of the six fixtures of torchft's
``diloco_regression_test.py`` (github.com/meta-pytorch/torchft at 7eb7087, test_fixtures/*mocked_updates_*.json)."""
ANCHORS: Mapping[tuple[int, float], list[list[float]]] = {
    (0, 0.0): [[1, 1], [-11, 1], [-11, -23], [-35, -23], [-35, -47]],
    (0, 0.5): [[1, 1], [-11, 1], [-11, -23], [-29, -23], [-29, -35]],
    (0, 1.0): [[1, 1], [-11, 1], [-11, -23], [-23, -23], [-23, -23]],
    (1, 0.0): [[1, 1], [-7, 1], [-7, -19], [-27, -19], [-27, -39]],
    (1, 0.5): [[1, 1], [-7, 1], [-7, -19], [-25, -19], [-25, -31]],
    (1, 1.0): [[1, 1], [-7, 1], [-7, -19], [-23, -19], [-23, -23]],
}
"""The global parameters of both layers after 0, 3, 6, 9 and 12 steps, from the same fixtures."""


@pytest.mark.parametrize(("delay", "blend"), TRACES)
def test_torchfts_golden_traces(transport: Transport, delay: int, blend: float) -> None:
    """Two layers, gradient 2, inner rate 1, outer SGD of rate 2, period 6, two fragments: equal to the last bit.

    torchft begins an average ``delay`` steps before a fragment is due and adopts it then, and Lentando begins it when
    the fragment is due: with a first round that is so much shorter, that is the same.
    """
    model = TwoScalars()
    outer, period = OuterSGD(2.0, 0.0, nesterov=False), FirstRound(6 - delay, 6)
    settings = Settings(LocalSGD(), outer, period, delay=delay, fragments=2, blend=blend)
    replica = Replica(transport, model, settings)
    assert replica.setup.outer is not None
    found, anchors = [model.x.tolist()], []
    for step in range(15):
        if step in (0, 3, 6, 9, 12):
            anchors.append(replica.setup.outer.state_dict()["anchors"]["flat"][0].tolist())
        replica.before_step()
        model.step()
        replica.after_step()
        found.append(model.x.tolist())
    assert list(zip(*found, strict=True)) == [tuple(trace) for trace in TRACES[delay, blend]]
    assert anchors == ANCHORS[delay, blend]


@pytest.mark.parametrize(
    "settings",
    [{"delay": 2}, {"delay": PERIOD}, {"delay": 1, "fragments": 2}, {"fragments": 2, "blend": 0.5}],
    ids=str,
)
def test_the_simulator_trains_the_same_numbers(transport: Transport, settings: dict[str, Any]) -> None:
    """In order of ranks, in which the simulator adds, as MPI does with two ranks at most; of integers, in any order."""
    gradient = reference.constant(DIMENSION)

    def train(over: Transport) -> Array:
        worker = Worker(
            over, gradient, np.zeros(DIMENSION), lambda step: 0.5, base=LocalSGD(), outer=SlowMomentum(1.0, 0.5),
            period=PERIOD, algorithm="ring", **settings,
        )  # fmt: skip
        return worker.run(4 * PERIOD + 1)

    assert_array_equal(train(transport), simulate(train, transport.size)[transport.rank])


@pytest.mark.parametrize("settings", [{"delay": 3}, {"delay": 2, "fragments": 2}, {"fragments": 2, "blend": 0.5}])
def test_steps_that_are_reported_together_change_nothing(transport: Transport, settings: dict[str, Any]) -> None:
    """As a compiled graph reports them: only when something is due."""
    once = trained(transport, 3 * PERIOD + 1, **settings).model.x
    counted = Worker(
        transport, QUADRATIC, START, changing, base=LocalSGD(), outer=SlowMomentum(0.8, 0.5), period=PERIOD, **settings
    )
    assert_allclose(counted.run_counted(3 * PERIOD + 1, 100), once, **EXACT)


def test_an_average_is_formed_while_the_main_thread_computes(transport: Transport) -> None:
    """Of 16 MB; the main thread makes no call meanwhile."""
    start = np.zeros(2_000_000)
    worker = Worker(
        transport, lambda *_: np.ones_like(start), start, lambda step: 0.5, base=LocalSGD(), period=2, delay=2
    )
    outer = worker.replica.setup.outer
    assert isinstance(outer, StreamedOuterStep)
    if not outer.is_overlapped:
        pytest.skip("this backend admits one thread only, or there is one rank")
    worker.run(2)
    deadline = time.monotonic() + 30
    while not outer.are_formed and time.monotonic() < deadline:
        time.sleep(0.01)
    assert outer.are_formed
    worker.run(2)
    assert_array_equal(worker.model.x, -2.0)


def test_replicas_that_average_gradients_stay_equal(transport: Transport) -> None:
    worker = trained(transport, 3 * PERIOD + 2, base=AllReduce(), delay=3)
    found = everyones(transport, worker.model.x)
    assert_array_equal(found, np.tile(found[0], (transport.size, 1)))


def test_a_period_that_adapts(transport: Transport) -> None:
    """Rounds become shorter than the delay: they adopt what is in flight at their end, before they contribute."""
    period = AdaptivePeriod(4, interval_seconds=float("inf"), interval_steps=4)
    worker = Worker(
        transport, QUADRATIC, START, lambda step: 0.1, base=LocalSGD(), period=period, delay=3,
        loss=lambda own: 0.5 ** own.replica.inner_steps,
    )  # fmt: skip
    worker.run(14)
    assert worker.replica.period == 1
    mean = everyones(transport, worker.model.x).mean(axis=0)
    single = Worker(transport, QUADRATIC, START, lambda step: 0.1, base=LocalSGD(), period=1, delay=1)
    single.run(14)
    assert np.abs(mean - everyones(transport, single.model.x).mean(axis=0)).max() < 0.5


def test_averaged_evaluates_what_will_be_adopted(transport: Transport) -> None:
    """Inside the block, the mean of what the ranks will have adopted; after it, training continues as without it."""
    whole = trained(transport, 3 * PERIOD, delay=3)
    worker = trained(transport, 2 * PERIOD + 1, delay=3)
    with worker.replica.averaged():
        inside = worker.model.x.copy()
    worker.replica.setup.adopt_in_flight()  # of another copy of the same training
    adopted = everyones(transport, worker.model.x).mean(axis=0)
    assert_allclose(inside, adopted, **EXACT)

    worker = trained(transport, 2 * PERIOD + 1, delay=3)
    with worker.replica.averaged():
        pass
    assert_array_equal(worker.run(PERIOD - 1), whole.model.x)


def test_ranks_that_adopt_rank_0_move_like_it(transport: Transport) -> None:
    """As Horovod's elastic states do after they have returned to a commit."""
    worker = trained(transport, PERIOD + 1, delay=3)
    moved = everyones(transport, worker.model.x)[0]
    transport.broadcast(worker.model.x)
    worker.replica.rollback.adopt_rank_0()
    worker.learning_rates = lambda step: 0.0
    worker.run(2)
    found = everyones(transport, worker.model.x)
    assert_array_equal(found, np.tile(found[0], (transport.size, 1)))
    assert not np.array_equal(found[0], moved) or transport.size == 1


def test_restart_drops_what_is_in_flight(transport: Transport) -> None:
    worker = trained(transport, PERIOD + 1, delay=3)
    own = everyones(transport, worker.model.x)
    worker.replica.restart()
    assert_allclose(worker.model.x, own.mean(axis=0), **EXACT)
    assert worker.replica.steps_until_due() == PERIOD


def test_values_that_are_not_finite_are_an_error_on_every_rank_when_adopted(transport: Transport) -> None:
    worker = trained(transport, PERIOD - 1, delay=2)
    if transport.rank == transport.size - 1:
        worker.model.x[3] = np.nan
        worker.model.watch.reset()
    worker.run(2)
    with pytest.raises(NonFiniteError, match="not adopted. First offending parameter: .*'part0' is not finite"):
        worker.run(1)
    assert_array_equal(worker.replica.setup.outer.state_dict()["anchors"]["flat"][0], START)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"delay": -1}, r"delay must be an integer >= 0 \(inner steps\), got -1"),
        ({"delay": PERIOD + 1}, "delay must be at most the period, 4 inner steps, .*: got 5"),
        ({"delay": 0.5}, "delay must be an integer"),
        ({"delay": "automatic"}, "delay must be an integer >= 0 .* or \"auto\", got 'automatic'"),
        ({"delay": "auto", "fragments": PERIOD + 1}, "fragments must be at most the period"),
        ({"fragments": 0}, r"fragments must be an integer >= 1"),
        ({"fragments": PERIOD + 1}, "fragments must be at most the period, 4 inner steps.*: got 5"),
        ({"fragments": 3}, "fragments=3: the model has 2 trained parameters"),
        ({"blend": 1.5}, "blend must be None or a number from 0 to 1, got 1.5"),
        ({"blend": float("nan")}, "blend must be None or a number from 0 to 1"),
        ({"delay": 1, "base": SGP()}, r"delay=1 is not possible over SGP\(.*gossip"),
        ({"delay": 1, "exact_average": False}, "delay=1 is not possible with exact_average=False"),
        ({"delay": 1, "base_buffers": "average"}, "delay=1 is not possible with base_buffers='average'"),
        ({"fragments": 2, "base_buffers": "reset"}, "fragments=2 is not possible with base_buffers='reset'"),
        ({"delay": 1, "on_nonfinite": "skip"}, "delay=1 is not possible with on_nonfinite='skip'"),
        ({"delay": 1, "base": AllReduce(), "period": None, "outer": None}, "delay=1 is not possible without period="),
    ],
    ids=str,
)
def test_what_cannot_work_is_one_sentence_on_every_rank(transport: Transport, settings: Any, message: str) -> None:
    with pytest.raises(ConfigurationError, match=message) as caught:
        trained(transport, 0, **settings)
    assert "\n" not in str(caught.value)


def test_join_is_refused(transport: Transport) -> None:
    with pytest.raises(ConfigurationError, match="join is not possible with delay, fragments or blend yet"):
        trained(transport, 0, delay=1).run_joined(1)


def test_different_delays_are_an_error_on_every_rank(transport: Transport) -> None:
    if transport.size > 1:
        with pytest.raises(MismatchError, match=r"the settings differ between ranks. delay: "):
            trained(transport, 0, delay=1 + transport.rank % 2)


def test_weights_that_the_program_sets_are_adopted_without_momentum(transport: Transport) -> None:
    """They may be set while fragments are in flight: all of these begin again from what was set."""
    worker = trained(transport, 2 * PERIOD + 1, delay=2, fragments=2)
    worker.model.x[:] = 3.0
    worker.learning_rates = lambda step: 0.0
    worker.run(2 * PERIOD)
    assert_allclose(worker.model.x, 3.0, **EXACT)
