"""Ranks that wrap other Keras optimizers, or whose learning rates come apart, on any world size."""

import itertools
import logging
from contextlib import nullcontext
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from case_selection import selected_cases

import lentando.tensorflow as lt

SCHEDULES = keras.optimizers.schedules


def is_last() -> bool:
    """Whether this rank is the one that differs: none does in a world of 1."""
    return lt.rank() == lt.size() - 1 > 0


def refused(stated: str) -> Any:
    return pytest.raises(lt.MismatchError, match=stated) if lt.size() > 1 else nullcontext()


def make_model() -> keras.Model:
    return keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(1)])


class Constant(SCHEDULES.LearningRateSchedule):  # type: ignore[misc]
    """A schedule that cannot be saved: it has no ``get_config``."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self.made = object()

    def __call__(self, step: Any) -> Any:
        return tf.constant(self.rate)


class PrivateRho(keras.optimizers.SGD):  # type: ignore[misc]
    """A user's optimizer that keeps an argument as a private attribute, and a counter as a public one."""

    def __init__(self, rho: float = 0.05, **options: Any) -> None:
        super().__init__(0.1, **options)
        self._rho = rho
        self.perturbed = 0


def scaled(**options: Any) -> Any:
    return keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.1), **options)


OPTIMIZERS = keras.optimizers
DIFFERENT: dict[str, tuple[Any, Any, str]] = {
    "class": (lambda: OPTIMIZERS.SGD(0.1), lambda: OPTIMIZERS.Adam(0.1), "Class: .*SGD; .*Adam"),
    "momentum": (lambda: OPTIMIZERS.SGD(0.1, 0.9), lambda: OPTIMIZERS.SGD(0.1, 0.5), "momentum: .*: 0.9; .*: 0.5"),
    "clipping": (OPTIMIZERS.Adam, lambda: OPTIMIZERS.Adam(clipnorm=1.0), "clipnorm: .*: None; .*: 1"),
    "rate": (lambda: OPTIMIZERS.SGD(0.001), lambda: OPTIMIZERS.SGD(0.1), "learning_rate: .*: 0.001; .*: 0.1"),
    "schedule": (
        lambda: OPTIMIZERS.SGD(SCHEDULES.ExponentialDecay(0.1, 10, 0.9)),
        lambda: OPTIMIZERS.SGD(SCHEDULES.ExponentialDecay(0.1, 10, 0.5)),
        "learning_rate: .*decay_rate: 0.9.*; .*decay_rate: 0.5",
    ),
    "own schedule": (
        lambda: OPTIMIZERS.SGD(Constant(0.1)),
        lambda: OPTIMIZERS.SGD(Constant(0.2)),
        "learning_rate: .*rate: 0.1.*; .*rate: 0.2",
    ),
    "private attribute": (PrivateRho, lambda: PrivateRho(0.1), "rho: .*: 0.05; .*: 0.1"),
    "loss scale": (scaled, lambda: scaled(initial_scale=8.0), "initial_scale of the LossScaleOptimizer"),
    "wrapped": (
        scaled,
        lambda: OPTIMIZERS.LossScaleOptimizer(OPTIMIZERS.SGD(0.1, momentum=0.5)),
        "momentum: .*: 0; .*: 0.5",
    ),
}


@pytest.mark.parametrize("case", DIFFERENT)
@pytest.mark.parametrize("method", ["allreduce", "slowmo"])
def test_other_optimizer_is_an_error_on_every_rank(case: str, method: str) -> None:
    usual, differing, stated = DIFFERENT[case]
    optimizer = differing() if is_last() else usual()
    with refused(f"the base optimizers differ between ranks. {stated}"):
        if method == "allreduce":
            lt.DistributedOptimizer(optimizer, model=make_model())
        else:
            lt.SlowMo(optimizer, model=make_model(), period=2)


@pytest.mark.parametrize(
    "make",
    [
        lambda: OPTIMIZERS.SGD(SCHEDULES.CosineDecay(0.1, 100)),
        lambda: OPTIMIZERS.SGD(Constant(0.1)),
        lambda: OPTIMIZERS.SGD(lambda: 0.1),
        lambda: OPTIMIZERS.AdamW(name=f"named_by_rank_{lt.rank()}"),
        scaled,
    ],
)
def test_equal_optimizers_are_no_difference(make: Any) -> None:
    lt.SlowMo(make(), model=make_model(), period=2)


def warned(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno >= logging.WARNING and "rates differ" in r.getMessage()]


@pytest.mark.parametrize(
    ("method", "way", "is_intended"),
    selected_cases(
        [("allreduce", "eager", False), ("allreduce", "eager", True), ("slowmo", "fit", False)],
        [*itertools.product(["allreduce", "slowmo"], ["fit", "eager"], [False, True])],
    ),
)
def test_rates_that_come_apart_are_named_once(
    method: str, way: str, is_intended: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = make_model()
    own = {"allreduce": {}, "slowmo": {"base": lt.LocalSGD(), "period": 2, "outer": lt.SlowMomentum()}}[method]
    optimizer = lt.DistributedOptimizer(OPTIMIZERS.SGD(1e-3), model=model, rates_may_differ=is_intended, **own)
    model.compile(optimizer=optimizer, loss="mse")
    x, y = np.full((8, 4), 1.0 + lt.rank(), np.float32), np.ones((8, 1), np.float32)

    def train() -> None:
        if way == "fit":
            model.fit(x, y, batch_size=2, verbose=0, shuffle=False)
            return
        for start in range(0, 8, 2):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean(tf.square(model(x[start : start + 2]) - y[start : start + 2]))
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables, loss=loss)

    train()
    assert not warned(caplog)
    if is_last():
        optimizer.learning_rate = 1e-4
    train()
    train()
    expected = 1 if lt.size() > 1 and lt.rank() == 0 and not is_intended else 0
    assert len(warned(caplog)) == expected
    assert all(f"{lt.size() - 1}: 0.0001" in text for text in warned(caplog))


@pytest.mark.parametrize("make", [lambda: OPTIMIZERS.Adam(0.1), scaled])
@pytest.mark.parametrize("method", ["allreduce", "slowmo"])
def test_state_on_one_rank_alone_is_warned_of(make: Any, method: str, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make_model(), make()
    if lt.rank() == 0:
        optimizer.apply([tf.ones_like(v) for v in model.trainable_variables], model.trainable_variables)
    own = {"allreduce": {}, "slowmo": {"base": lt.LocalSGD(), "period": 2, "outer": lt.SlowMomentum()}}[method]
    lt.DistributedOptimizer(optimizer, model=model, **own)
    texts = [r.getMessage() for r in caplog.records if "have different state" in r.getMessage()]
    assert len(texts) == (1 if lt.size() > 1 and lt.rank() == 0 else 0)
    assert all("rank 0: iteration 1; rank" in text and ": iteration 0. Unless" in text for text in texts)
