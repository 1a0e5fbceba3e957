"""Settings as data, by which ranks are compared and checkpoints are continued or refused."""

import json
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np
import pytest
from numpy_model import Worker

from lentando.comm.errors import CheckpointError, ConfigurationError, MismatchError
from lentando.comm.topology import Circulant, FromMatrix, OnePeerExponential, Ring
from lentando.comm.transports.single import SingleTransport
from lentando.optimizers.checkpoint.old_settings import settings_from_text
from lentando.optimizers.methods import adacomm
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.describe import as_text, describe, differences
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.period import FixedPeriod, PostLocal
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.settings_comparison import check_same_settings, different_from
from lentando.optimizers.rules.slow_momentum import SlowMomentum

LOCAL = LocalSGD()
MATRIX = [[0.75, 0.25], [0.25, 0.75]]


class Stepwise:
    """A schedule as users write them: no dataclass, and it changes while it is at work."""

    def __init__(self, before: int, after: Any, start: int = 100) -> None:
        self._before, self._after, self.start = before, after, start
        self._round = 0

    def steps(self) -> int:
        return self._before if self._round < self.start else self._after

    def update(self, summary: Any) -> None:
        self._round = summary.round

    def state_dict(self) -> dict[str, Any]:
        return {"round": self._round}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._round = state["round"]


class Described(Stepwise):
    """One that says itself what decides."""

    def describe(self) -> dict[str, Any]:
        return {"before": self._before}


@dataclass
class Counting:
    limit: int
    count: int = field(default=0, init=False)
    label: str = field(default="", compare=False)


def halved(step: int, by: int = 2) -> int:
    return step // by


def captured(start: int) -> Any:
    return lambda step: step < start


EQUAL: list[tuple[Any, Any]] = [
    (12, FixedPeriod(12)),
    (np.int64(12), FixedPeriod(np.int32(12))),
    (PostLocal(10, 4), PostLocal(10, FixedPeriod(4))),
    (SlowMomentum(1, 0.5), SlowMomentum(1.0, np.float64(0.5))),
    (Stepwise(4, 8), Stepwise(4, FixedPeriod(8))),
    (Described(4, 8), Described(4, 16)),
    (Counting(3), Counting(3, "another label")),
    (FromMatrix(MATRIX), FromMatrix(np.array(MATRIX, np.float32))),
    (Circulant([[1], [-1]]), Circulant(((1,), (-1,)))),
    (captured(3), captured(3)),
    (object(), object()),
    ({"b": 1, "a": {2, 1}}, {"a": {1, 2}, "b": True + 0}),
]
DIFFERENT: list[tuple[Any, Any]] = [
    (12, FixedPeriod(13)),
    (PostLocal(10, 4), PostLocal(10, 5)),
    (SlowMomentum(1.0, 0.5), OuterSGD(1.0, 0.5)),
    (Stepwise(4, 8), Stepwise(4, 8, start=200)),
    (Stepwise(4, Stepwise(1, 2)), Stepwise(4, Stepwise(1, 3))),
    (Described(4, 8), Described(5, 8)),
    (Stepwise(4, 8), Described(4, 8)),
    (FromMatrix(MATRIX), FromMatrix([[0.5, 0.5], [0.5, 0.5]])),
    (Circulant([[1], [-1]]), Circulant([[1]])),
    (captured(3), captured(4)),
    (partial(halved, by=3), partial(halved, by=4)),
    (halved, captured),
    (np.arange(100), np.arange(100) * 2),
    (1, True),
    (0, False),
    (None, 0),
]


@pytest.mark.parametrize(("one", "other"), EQUAL, ids=lambda value: type(value).__name__)
def test_equal_settings_are_equal_data(one: Any, other: Any) -> None:
    assert not differences([describe(one), describe(other)])
    assert json.loads(json.dumps(describe(one), allow_nan=False)) == describe(one)
    assert "0x" not in as_text(describe(one))


@pytest.mark.parametrize(("one", "other"), DIFFERENT, ids=lambda value: type(value).__name__)
def test_different_settings_are_different_data(one: Any, other: Any) -> None:
    assert differences([describe(one), describe(other)])


def test_objects_that_contain_themselves_have_an_end() -> None:
    own = Stepwise(4, 8)
    own.start = own  # type: ignore[assignment]
    assert describe(own) == {"class": "Stepwise", "after": 8, "before": 4, "round": 0, "start": {"class": "Stepwise"}}


def test_the_data_of_settings() -> None:
    settings = Settings(SGP(Ring()), SlowMomentum(1.0, 0.5), FixedPeriod(12))
    assert settings.description == {
        "version": 1,
        "base": {"class": "SGP", "topology": {"class": "Ring"}, "wire_dtype": None},
        "outer": {"class": "SlowMomentum", "slow_lr": 1, "slow_momentum": 0.5, "nesterov": False},
        "period": 12,
        "base_buffers": "maintain",
        "exact_average": True,
        "algorithm": "auto",
        "on_nonfinite": "raise",
        "rates_may_differ": False,
        "delay": 0,
        "fragments": 1,
        "blend": None,
        "wire_dtype": None,
        "weighting": "equal",
        "movement_penalty": None,
    }
    assert settings.description.keys() - settings.method.keys() == {"on_nonfinite", "rates_may_differ"}


def test_the_data_of_settings_are_those_from_before_training() -> None:
    schedule = Stepwise(4, 8)
    settings = Settings(LOCAL, None, schedule)
    before = dict(settings.method)
    schedule._round = 7
    assert settings.method == before


def test_ranks_that_differ_are_named_with_each_setting() -> None:
    described = [Settings(SGP(Ring()), None, period).description for period in (3, FixedPeriod(3), 4)]
    described[2]["base"] = describe(SGP(OnePeerExponential(), wire_dtype="bfloat16"))
    with pytest.raises(MismatchError) as error:
        check_same_settings(described)
    assert str(error.value).startswith(
        "the settings differ between ranks. base.topology: ranks 0 and 1: Ring(); rank 2: OnePeerExponential(); "
        "base.wire_dtype: ranks 0 and 1: None; rank 2: 'bfloat16'; period: ranks 0 and 1: 3; rank 2: 4. Give"
    )
    check_same_settings(described[:2])


def test_a_setting_that_is_new_has_had_its_default() -> None:
    settings = Settings(SGP(Ring()), SlowMomentum(), 3)
    saved = json.loads(json.dumps(settings.method))
    del saved["base"]["wire_dtype"], saved["outer"]["nesterov"], saved["exact_average"]
    assert not different_from(settings, saved)
    other = Settings(SGP(Ring(), wire_dtype="float16"), SlowMomentum(nesterov=True), FixedPeriod(4))
    assert different_from(other, saved) == (
        "base.wire_dtype was None, and is 'float16' here; outer.nesterov was False, and is True here; "
        "period was 3, and is 4 here"
    )


def test_settings_of_a_newer_version_are_refused() -> None:
    settings = Settings(SGP(), None, 3)
    assert different_from(settings, {**settings.method, "version": 2}) == (
        "they are of version 2 of their format, this Lentando reads 1"
    )


# --- what earlier versions wrote ----------------------------------------------------------------------------

END = "base_buffers='maintain', exact_average=True, algorithm='auto')"
BEFORE = [
    (f"Settings(base=AllReduce(algorithm='auto'), outer=None, period=4, {END}", Settings(AllReduce(), None, 4)),
    (f"Settings(base=SGP(topology=Ring()), outer=None, period=None, {END}", Settings(SGP(Ring()))),
    (
        f"Settings(base=SGP(topology=Circulant, wire_dtype='bfloat16'), outer=None, period=None, {END}",
        Settings(SGP(Circulant([[1]]), "bfloat16")),
    ),
    (
        f"Settings(base=DPSGD(topology=FromMatrix(8e207f42)), outer=None, period=None, {END}",
        Settings(DPSGD(FromMatrix(MATRIX))),
    ),
    (
        (
            "Settings(base=OSGP(topology=OnePeerExponential(), staleness=1, deterministic=False), "
            f"outer=SlowMomentum(slow_lr=1.0, slow_momentum=np.float64(0.5), nesterov=False), period=3, {END}"
        ),
        Settings(OSGP(), SlowMomentum(), FixedPeriod(3)),
    ),
    (
        (
            "Settings(base=LocalSGD(), outer=None, period=PostLocal(start=2, period=AdaptivePeriod(initial_period=2, "
            "interval_seconds=inf, interval_steps=None, refined=True, learning_rate_exponent=1, loss_floor=-1.5, "
            f"min_period=1, max_period=None)), {END}"
        ),
        adacomm(initial_period=2, interval_seconds=float("inf"), warmup_steps=2, loss_floor=-1.5),
    ),
    (
        f"Settings(base=LocalSGD(), outer=None, period=PostLocal(start=3, period=FixedPeriod(period=2)), {END}",
        Settings(LOCAL, None, PostLocal(3, 2)),
    ),
    (
        f"Settings(base=LocalSGD(), outer=OuterSGD(lr=0.7, momentum=0.9, nesterov=True), period=500, {END}",
        Settings(LOCAL, OuterSGD(), 500),
    ),
    (f"Settings(base=LocalSGD(), outer=None, period=Stepwise, {END}", Settings(LOCAL, None, Stepwise(4, 8))),
    (
        (
            "Settings(base=AllReduce(algorithm='engine', bucket_bytes=4096, overlap=False), outer=None, period=None, "
            "base_buffers='maintain', exact_average=True, algorithm='engine')"
        ),
        Settings(AllReduce("backend", bucket_bytes=4096), algorithm="backend"),
    ),
]


@pytest.mark.parametrize(("text", "settings"), BEFORE)
def test_settings_that_were_text_are_read(text: str, settings: Settings) -> None:
    assert different_from(settings, settings_from_text(text)) == ""
    assert different_from(Settings(AllReduce(bucket_bytes=8), None, 9), settings_from_text(text))


@pytest.mark.parametrize(
    "period", ["<Stepwise of 4>", "Stepwise(4)", "__import__('os').getpid()", "[x for x in (1,)]", "4 + 4"]
)
def test_text_that_cannot_be_read_is_refused(period: str) -> None:
    text = f"Settings(base=LocalSGD(), outer=None, period={period}, {END}"
    with pytest.raises(
        CheckpointError, match=r"recorded by an earlier version, .* The text is Settings\(base=LocalSGD"
    ):
        settings_from_text(text)


# --- the state of a replica ---------------------------------------------------------------------------------

BASES: list[tuple[Any, Any, str]] = [
    (AllReduce(), AllReduce("ring"), "base.algorithm was 'auto', and is 'ring' here"),
    (SGP(Ring()), SGP(Ring(), wire_dtype="bfloat16"), "base.wire_dtype was None, and is 'bfloat16' here"),
    (OSGP(Ring()), OSGP(Ring(), staleness=2), "base.staleness was 1, and is 2 here"),
    (DPSGD(Ring()), SGP(Ring()), r"base was DPSGD\(topology=Ring\(\), .*, and is SGP\(topology"),
]


def worker(**settings: Any) -> Worker:
    constant = lambda *_: np.ones(4)  # noqa: E731 - a gradient
    return Worker(SingleTransport(), constant, np.zeros(4), lambda step: 0.1, **{"period": 4, **settings})


@pytest.mark.parametrize(("base", "other", "stated"), BASES, ids=lambda value: type(value).__name__)
def test_a_state_of_other_settings_is_refused_with_those_that_differ(base: Any, other: Any, stated: str) -> None:
    before = worker(base=base)
    before.run(3)
    state = before.replica.state_dict()
    after = worker(base=base, period=FixedPeriod(4), on_nonfinite="skip" if base.mixes_parameters else "raise")
    after.replica.load_state_dict(state)
    assert after.replica.inner_steps == 3
    with pytest.raises(
        ConfigurationError, match=f"cannot resume: the state was saved with other settings .*: {stated}"
    ):
        worker(base=other).replica.load_state_dict(state)


@pytest.mark.parametrize("other", [AllReduce(overlap=True), AllReduce(overlap=False), AllReduce(bucket_bytes=8)])
def test_when_gradients_are_sent_may_change(other: Any) -> None:
    before = worker(base=AllReduce())
    before.run(3)
    after = worker(base=other)
    after.replica.load_state_dict(before.replica.state_dict())
    assert after.replica.inner_steps == 3
    earlier = {**Settings().description, "base": {**describe(AllReduce()), "overlap": False, "bucket_bytes": 26214400}}
    assert not different_from(Settings(base=other), earlier)


def test_a_state_of_an_earlier_version_is_refused() -> None:
    own: Literal[2] = 2
    state = {**worker(base=SGP(Ring())).replica.state_dict(), "version": own}
    with pytest.raises(ConfigurationError, match=r"has version 2 of its format, this Lentando reads version 3: resume"):
        worker(base=SGP(Ring())).replica.load_state_dict(state)
