"""Settings that cannot work are refused when they are given, before anything is sent."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from lentando.comm.errors import ConfigurationError
from lentando.comm.topology import Hybrid, NodeAware, PPeerExponential, Ring, Torus
from lentando.optimizers.loss_argument import as_number
from lentando.optimizers.methods import adacomm
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.period import FixedPeriod, PostLocal
from lentando.optimizers.rules.settings import Settings
from lentando.optimizers.rules.slow_momentum import SlowMomentum

LOCAL = LocalSGD()
nan, inf = math.nan, math.inf

REFUSED: dict[str, tuple[Callable[[Any], object], list[Any], str]] = {
    "staleness": (lambda v: OSGP(staleness=v), [-1, 1.5, 1.0, True, nan, "1", None], "staleness must be an integer >="),
    "huge staleness": (lambda v: OSGP(staleness=v), [65, 10**9], "staleness must be 64 inner steps at most"),
    "deterministic": (lambda v: OSGP(deterministic=v), ["no", None, 1], "deterministic must be True or False"),
    "topology": (SGP, ["ring", None, 3], "topology must be Ring"),
    "topology's class": (DPSGD, [Ring], "got the class Ring itself"),
    "period": (
        lambda v: Settings(LOCAL, None, v),
        [0, -1, True, nan, inf, 2.0, "3", [3], FixedPeriod],
        "period must be an integer >= 1",
    ),
    "post-local": (lambda v: PostLocal(v, 3), [-1, nan, True, None], "start of PostLocal must be an integer >= 0"),
    "slow momentum": (lambda v: SlowMomentum(1.0, v), [1.5, 1, -0.1, nan, True, "0.5", None], "slow_momentum must be"),
    "slow rate": (SlowMomentum, [nan, inf, 0, -1, True, "1", None], "slow_lr must be a number > 0"),
    "nesterov": (lambda v: SlowMomentum(1.0, 0.5, v), ["yes", None, 2], "nesterov must be True or False"),
    "DiLoCo's rate": (OuterSGD, [nan, inf, 0, -1, True, None], "outer learning rate must be a number > 0"),
    "DiLoCo's momentum": (lambda v: OuterSGD(0.7, v), [1, 1.5, nan, -1, None], "outer momentum must be a number >= 0"),
    "DiLoCo's nesterov": (lambda v: OuterSGD(0.7, 0.9, v), ["yes", None], "nesterov must be True or False"),
    "base": (lambda v: Settings(v, None, 3), ["sgp", None, 0.5], "base must be AllReduce"),
    "base's class": (lambda v: Settings(v, None, 3), [LocalSGD, AllReduce], "got the class"),
    "outer": (lambda v: Settings(LOCAL, v, 3), ["slowmo", 0.5, True], "outer must be SlowMomentum"),
    "outer's class": (lambda v: Settings(LOCAL, v, 3), [SlowMomentum], "got the class SlowMomentum itself"),
    "exact average": (
        lambda v: Settings(SGP(), SlowMomentum(), 3, exact_average=v),
        ["no", None, 2],
        "exact_average must be True or False",
    ),
    "rates": (lambda v: Settings(rates_may_differ=v), ["yes", None], "rates_may_differ must be True or False"),
    "buffers": (lambda v: Settings(LOCAL, None, 3, v), [True, None, ["reset"]], "base_buffers must be one of 'reset'"),
    "algorithm": (AllReduce, ["fast", None, 1], "algorithm must be one of 'auto'"),
    "overlap": (lambda v: AllReduce(overlap=v), ["yes", 1], "overlap must be True or False"),
    "bucket": (lambda v: AllReduce(bucket_bytes=v), [True, 0, nan, "1"], "bucket_bytes must be an integer > 0"),
    "interval_seconds": (
        lambda v: adacomm(interval_seconds=v),
        [nan, 0, -1, True, "1", None],
        "interval_seconds must be > 0",
    ),
    "block momentum": (lambda v: adacomm(slow_momentum=v), [1.5, nan, None], "slow_momentum must be a number"),
    "AdaComm's buffers": (lambda v: adacomm(base_buffers=v), [0, "", "zero"], "base_buffers must be one of"),
    "refined": (lambda v: adacomm(refined=v), ["no", None], "refined must be True or False"),
    "peers": (PPeerExponential, [0, nan, 1.5, True], "peers must be an integer >= 1"),
    "hybrid": (lambda v: Hybrid(Ring(), v, Ring()), [-1, nan, 1.5], "steps must be an integer >= 0"),
    "node": (lambda v: NodeAware(Ring(), v), [0, nan, True, "2"], "local_size must be an integer >= 1"),
    "torus": (Torus, [0, nan, 1.5], "rows must be an integer >= 1"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_impossible_setting_is_refused_with_what_was_expected(name: str) -> None:
    make, values, stated = REFUSED[name]
    for value in values:
        with pytest.raises(ConfigurationError, match=stated):
            make(value)


def test_numbers_of_numpy_are_numbers() -> None:
    """And mean the same as Python's on other ranks and in checkpoints."""
    settings = Settings(LOCAL, SlowMomentum(np.float64(1), np.float64(0.5)), np.int64(3))
    assert settings.description == Settings(LOCAL, SlowMomentum(1.0, 0.5), 3).description
    period = settings.make_period()
    assert period is not None
    assert type(period.steps()) is int
    assert OSGP(staleness=np.int64(2)).staleness == 2


@pytest.mark.parametrize("loss", [2.5, np.float32(2.5), np.array(2.5), np.array([2.5]), [2.5]])
def test_loss_is_one_number(loss: Any) -> None:
    assert as_number(loss) == 2.5


@pytest.mark.parametrize(
    ("loss", "found"),
    [
        (np.ones((8, 2)), r"shape \(8, 2\)"),
        ([0.5, 1.0], r"shape \(2,\)"),
        (np.ones(0), r"shape \(0,\)"),
        ("low", "str 'low'"),
        ({"loss": 1.0}, "dict"),
    ],
)
def test_loss_that_is_not_one_number_is_refused(loss: Any, found: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"loss= must be one number.*got {found}.*Reduce it first"):
        as_number(loss)
