"""What becomes of the state of Keras's optimizers at outer steps, and which of them cannot work in bfloat16."""

from collections.abc import Callable
from typing import Any

import keras
import pytest
import tensorflow as tf

import lentando.tensorflow as lt

OPTIMIZERS = keras.optimizers
MAINTAINED: dict[str, Callable[[], Any]] = {
    "adam": OPTIMIZERS.Adam,
    "nadam": OPTIMIZERS.Nadam,
    "adamax": OPTIMIZERS.Adamax,
    "rmsprop": lambda: OPTIMIZERS.RMSprop(momentum=0.5),
    "adafactor": OPTIMIZERS.Adafactor,
    "adagrad": OPTIMIZERS.Adagrad,
    "scaled": lambda: OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.Adam(), initial_scale=1.0),
    "moving average": lambda: OPTIMIZERS.Adam(use_ema=True),
}
RESET: dict[str, Callable[[], Any]] = {
    "sgd": lambda: OPTIMIZERS.SGD(0.01, momentum=0.9),
    "lion": lambda: OPTIMIZERS.Lion(0.01),
    "scaled": lambda: OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.SGD(0.01, momentum=0.9), initial_scale=1.0),
}


def steps_of_base(base: Any, wrap: Callable[..., Any], **options: Any) -> int:
    """The count of the base optimizer itself after an outer step: 0 if that has made it new."""
    variable = keras.Variable(tf.ones([3]))
    optimizer = wrap(base, **options)
    for step in range(2):
        optimizer.apply([tf.fill([3], 1.0 + step)], [variable], loss=1.0 + step)
    return int(getattr(base, "inner_optimizer", base).iterations)


@pytest.mark.parametrize("name", MAINTAINED)
def test_state_of_optimizers_with_second_moments_stays(name: str) -> None:
    assert steps_of_base(MAINTAINED[name](), lt.SlowMo, period=2) == 2


@pytest.mark.parametrize("name", RESET)
def test_state_of_others_begins_again(name: str) -> None:
    assert steps_of_base(RESET[name](), lt.SlowMo, period=2) == 0
    assert steps_of_base(RESET[name](), lt.AdaComm, initial_period=2, slow_momentum=0.3) == 0
    assert steps_of_base(RESET[name](), lt.DiLoCo, period=2) == 2


def test_flat_report_is_one_number_for_each_name() -> None:
    variable = keras.Variable(tf.ones([3]))
    optimizer = lt.AdaComm(OPTIMIZERS.SGD(0.01), initial_period=1, interval_steps=1)
    for step in range(6):
        optimizer.apply([tf.fill([3], 1.0 + step)], [variable], loss=1.0 + lt.rank() + step)
    flat = optimizer.report(flat=True)
    assert all(type(value) in (int, float) for value in flat.values())
    assert flat["inner_steps"] == 6
    assert optimizer.report()["decisions"]
    assert "decisions" not in flat


# --- 16 bits ------------------------------------------------------------------------------------------------

BROKEN: dict[str, Callable[[], Any]] = {
    "adam": lambda: OPTIMIZERS.Adam(0.1),
    "adamw": lambda: OPTIMIZERS.AdamW(0.1),
    "lamb": lambda: OPTIMIZERS.Lamb(0.1),
    "nadam": lambda: OPTIMIZERS.Nadam(0.1),
    "schedule-free": lambda: OPTIMIZERS.ScheduleFreeAdamW(0.1),
    "adamax, beta_1": lambda: OPTIMIZERS.Adamax(0.1, beta_1=0.999),
    "adam, beta_1": lambda: OPTIMIZERS.Adam(0.1, beta_1=0.999, beta_2=0.99),
    "scaled": lambda: OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.Adam(0.1), initial_scale=1.0),
}
SOUND: dict[str, Callable[[], Any]] = {
    "adam, beta_2": lambda: OPTIMIZERS.Adam(0.1, beta_2=0.99),
    "lamb, beta_2": lambda: OPTIMIZERS.Lamb(0.1, beta_2=0.99),
    "adamax": lambda: OPTIMIZERS.Adamax(0.1),
    "adafactor": lambda: OPTIMIZERS.Adafactor(0.1),
    "rmsprop": lambda: OPTIMIZERS.RMSprop(0.1, rho=0.999),
    "sgd": lambda: OPTIMIZERS.SGD(0.1, momentum=0.999),
    "lion": lambda: OPTIMIZERS.Lion(0.1, beta_2=0.999),
}


def warnings_and_value(make: Callable[[], Any], dtype: str, log: pytest.LogCaptureFixture) -> tuple[list[str], float]:
    """What wrapping it says, and what four steps by themselves make of a variable that is 1."""
    log.clear()
    variable = keras.Variable(tf.ones([4, 4], dtype), dtype=dtype)
    lt.DistributedOptimizer(make()).build([variable])
    own = make()
    own = getattr(own, "inner_optimizer", own)
    own.build([variable])
    for _ in range(4):
        own.apply([tf.convert_to_tensor(variable)], [variable])
    return [record.getMessage() for record in log.records if "rounded" in record.getMessage()], float(variable[0, 0])


@pytest.mark.parametrize("name", BROKEN)
def test_optimizers_that_cannot_work_in_bfloat16_are_named(name: str, caplog: pytest.LogCaptureFixture) -> None:
    if name == "schedule-free" and not hasattr(OPTIMIZERS, "ScheduleFreeAdamW"):
        pytest.skip("this Keras has none")
    stated, value = warnings_and_value(BROKEN[name], "bfloat16", caplog)
    assert value == 1 or value != value  # it has not moved, or is NaN
    assert len(stated) == (lt.rank() == 0)
    assert all(f"{'beta_1' if 'beta_1' in name else 'beta_2'}=0.999 is rounded to 1 in bfloat16" in s for s in stated)
    stated, value = warnings_and_value(BROKEN[name], "float32", caplog)
    assert not stated
    assert value < 0.99


@pytest.mark.parametrize("name", SOUND)
def test_others_are_not(name: str, caplog: pytest.LogCaptureFixture) -> None:
    stated, value = warnings_and_value(SOUND[name], "bfloat16", caplog)
    assert not stated
    assert value < 0.99


def test_optimizers_that_work_in_float16_are_not_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    stated, value = warnings_and_value(BROKEN["adam"], "float16", caplog)
    assert not stated
    assert value < 0.99
