"""Ranks of Keras whose values are not finite: named on every rank, or left out; eagerly, in a graph, in fit."""

from typing import Any

import keras
import keras_training
import numpy as np
import pytest
import tensorflow as tf
from case_selection import selected_cases
from keras_training import Vector, cross_entropy, make_model

import lentando.tensorflow as lt

several = pytest.mark.skipif(lt.size() == 1, reason="a rank must be left")
CULPRIT = lt.size() - 1
WAYS = ["eager", "graph", "fit"]
START = np.linspace(-1, 1, 13)


def sgd(momentum: float = 0.5) -> keras.optimizers.Optimizer:
    return keras.optimizers.SGD(0.0625, momentum)


def error_of(way: str) -> Any:
    """What NonFiniteError is when it comes from a graph of the user's; fit raises it as it is."""
    return tf.errors.UnknownError if way == "graph" else lt.NonFiniteError


def on_every_rank(text: str, part: str) -> bool:
    return all(part in other for other in lt.allgather_object(text))


def train(model: keras.Model, optimizer: Any, way: str, steps: int, bad_step: int | None = None) -> None:
    data = list(keras_training.batches(lt.rank(), steps))
    if bad_step is not None and lt.rank() == CULPRIT:
        data[bad_step][0][0, 0, 0, 0] = np.nan
    if way == "fit":
        images, labels = (np.concatenate(column) for column in zip(*data, strict=True))
        if not model.compiled:
            model.compile(optimizer=optimizer, loss=cross_entropy)
        model.fit(images, labels, batch_size=6, epochs=1, shuffle=False, verbose=0)
        return
    step = keras_training.train_step(model, optimizer)
    step = keras_training.GRAPHS.setdefault(optimizer, tf.function(step)) if way == "graph" else step
    for images, labels in data:
        step(tf.constant(images), tf.constant(labels))


def assert_equal_and_finite(model: keras.Model) -> None:
    for variable in model.weights:
        value = variable.numpy()
        assert np.isfinite(value).all(), variable.path
        for other in lt.allgather_object(value):
            np.testing.assert_array_equal(other, value, variable.path)


@pytest.mark.parametrize("way", selected_cases(["eager", "fit"], WAYS))
def test_allreduce_names_gradient_and_loss(way: str) -> None:
    model = make_model()
    optimizer = lt.DistributedOptimizer(sgd(), model=model)
    with pytest.raises(error_of(way)) as error:
        train(model, optimizer, way, 4, bad_step=2)
    text = str(error.value)
    assert on_every_rank(text, "average of gradients of inner step 3: not all values are finite")
    assert on_every_rank(text, f"rank {CULPRIT}: the gradient of 'sequential/conv/kernel' is not finite, its loss")


@pytest.mark.parametrize("way", selected_cases(["graph", "fit"], WAYS))
def test_outer_step_names_variable_and_loss(way: str) -> None:
    model = make_model()
    optimizer = lt.SlowMo(sgd(), model=model, period=3)
    with pytest.raises(error_of(way)) as error:
        train(model, optimizer, way, 4, bad_step=1)
    text = str(error.value)
    assert on_every_rank(text, "outer step 1: not all values are finite")
    assert on_every_rank(text, f"rank {CULPRIT}: 'sequential/conv/kernel' is not finite, its loss is not finite")


@several
@pytest.mark.parametrize(
    ("base", "way"),
    [
        (lt.LocalSGD(), "fit"),
        (lt.SGP(), "graph"),
        (lt.AllReduce(), "eager"),
        *selected_cases([], [(lt.LocalSGD(), "eager"), (lt.LocalSGD(), "graph"), (lt.AllReduce(), "graph")]),
    ],
    ids=str,
)
def test_rank_is_restored_with_a_new_optimizer(base: Any, way: str) -> None:
    model = make_model()
    optimizer = lt.SlowMo(sgd(), model=model, base=base, period=4, base_buffers="maintain", on_nonfinite="skip")
    train(model, optimizer, way, 8, bad_step=6)
    assert_equal_and_finite(model)
    momenta = [v.numpy() for v in optimizer.variables if v.name.endswith("momentum")]
    assert momenta
    assert all(np.isfinite(momentum).all() for momentum in momenta)
    if isinstance(base, lt.LocalSGD):
        assert any(momentum.any() for momentum in momenta) == (lt.rank() != CULPRIT)
    assert (optimizer.report()["left_out"] > 0) == (lt.rank() == CULPRIT)
    assert optimizer.iterations == 8
    train(model, optimizer, way, 4)
    assert_equal_and_finite(model)


@pytest.mark.parametrize("way", ["eager", "graph"])
def test_loss_scale_optimizer_keeps_its_own_protocol(way: str) -> None:
    base = keras.optimizers.LossScaleOptimizer(sgd(), initial_scale=16.0)
    trained = Vector(START, lt.DistributedOptimizer(base, on_nonfinite="skip"), graph=way == "graph")
    for step in range(3):
        gradient = np.ones(13) * 16
        if step == 1 and lt.rank() == CULPRIT:
            gradient[0] = np.inf
        before = trained.value.copy()
        trained.step(gradient, np.inf if step == 1 else 1.0)
        assert (trained.value == before).all() == (step == 1)
    assert float(base.dynamic_scale) == 8
    assert trained.optimizer.report()["left_out"] == 0


@several
@pytest.mark.parametrize("graph", [False, True])
def test_adacomm_decides_by_the_losses_that_are_finite(graph: bool) -> None:
    optimizer = lt.AdaComm(sgd(0.0), initial_period=4, interval_steps=4, on_nonfinite="skip")
    trained = Vector(START, optimizer, graph)
    for step in range(12):
        trained.step(np.zeros(13), 4.0 if step < 4 else float("nan") if lt.rank() == CULPRIT else 1.0)
    periods = [decision["period"] for decision in optimizer.report()["decisions"]]
    assert periods[0] == 2
    assert all(other == periods for other in lt.allgather_object(periods))


def test_moving_average_of_the_weights_is_refused_with_skip() -> None:
    with pytest.raises(lt.ConfigurationError, match=r"on_nonfinite='skip'.*use_ema=True"):
        lt.DistributedOptimizer(keras.optimizers.SGD(0.1, use_ema=True), on_nonfinite="skip")
