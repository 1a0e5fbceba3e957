"""CO2's outer rule against the formula, its settings, and their comparison with those of a checkpoint."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose, assert_array_equal

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.methods import slowmo
from lentando.optimizers.rules.co2_momentum import CO2Momentum
from lentando.optimizers.rules.settings_comparison import different_from
from lentando.optimizers.rules.slow_momentum import SlowMomentum


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize(("penalty", "clip"), [(1.0, 0.7), (3.0, 0.2), (2.5, None)])
def test_the_rule_is_the_formula(penalty: float, clip: float | None, dtype: Any) -> None:
    random = np.random.default_rng(0)
    x, u = random.normal(size=20).astype(dtype), np.zeros(20, dtype)
    expected_x, expected_u, clipped = x.astype(np.float64), np.zeros(20), 0
    rule = CO2Momentum(0.9, 0.6, gap_penalty=penalty, momentum_clip=clip)
    for gamma in (0.1, 0.05, 0.2):
        mean = (x + 0.1 * random.normal(size=20)).astype(dtype)
        moved = 0.6 * expected_u + (expected_x - mean) / (penalty * gamma)
        expected_u = moved if clip is None else np.sign(moved) * np.minimum(np.abs(moved), clip)
        clipped += int((expected_u != moved).sum())
        expected_x = expected_x - 0.9 * gamma * expected_u
        rule.step(x, u, mean, gamma)
        assert_allclose(u, expected_u, rtol=2e-5 if dtype is np.float32 else 1e-13, atol=1e-6)
        assert_allclose(x, expected_x, rtol=2e-5 if dtype is np.float32 else 1e-13, atol=1e-6)
    assert (0 < clipped < 60) == (clip is not None)


def test_a_round_at_learning_rate_0_adopts_the_average() -> None:
    x, u, mean = np.zeros(3), np.ones(3), np.arange(3.0)
    CO2Momentum(momentum_clip=0.5).step(x, u, mean, 0.0)
    assert_array_equal(x, [0, 1, 2])
    assert_array_equal(u, 1.0)


def test_values_that_are_not_finite_stay_so() -> None:
    x, u, mean = np.zeros(2), np.zeros(2), np.array([np.nan, 1.0])
    CO2Momentum(momentum_clip=0.5).step(x, u, mean, 1.0)
    assert np.isnan(x[0])
    assert x[1] == 0.5


def test_slowmo_takes_the_options() -> None:
    assert slowmo().outer == SlowMomentum()
    assert slowmo(delay=12, gap_penalty=2.0).outer == CO2Momentum(gap_penalty=2.0)
    assert slowmo(slow_momentum=0.2, momentum_clip=1.0).outer == CO2Momentum(slow_momentum=0.2, momentum_clip=1.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"gap_penalty": 0.5}, "gap_penalty must be a number >= 1, got 0.5"),
        ({"gap_penalty": float("nan")}, "gap_penalty must be a number >= 1"),
        ({"momentum_clip": 0.0}, "momentum_clip must be a number > 0 or None, got 0.0"),
        ({"momentum_clip": 1.0, "slow_momentum": 0.0}, "slow_momentum=0 has none"),
        ({"momentum_clip": 1.0, "nesterov": True}, "with nesterov=False only"),
    ],
)
def test_wrong_options_get_one_sentence(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigurationError, match=message):
        slowmo(**options)


def test_a_checkpoint_of_other_options_is_refused() -> None:
    saved = slowmo(delay=12, gap_penalty=2.0, momentum_clip=1.0).method
    found = different_from(slowmo(delay=12, gap_penalty=3.0, momentum_clip=1.0), saved)
    assert found == "outer.gap_penalty was 2, and is 3 here"
    assert "SlowMomentum" in different_from(slowmo(delay=12), saved)
