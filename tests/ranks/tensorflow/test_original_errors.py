"""Errors of Lentando's own come out of ``fit`` and of graphs as what they are, with a short traceback."""

import traceback
from typing import Any

import keras
import keras_training  # noqa: F401 - quiets TensorFlow
import numpy as np
import pytest
import tensorflow as tf
from case_selection import selected_cases

import lentando.tensorflow as lt

X = np.ones((8, 3), np.float32)
NAN = np.full(8, np.nan, np.float32)


def make(base: Any, **options: Any) -> keras.Model:
    model = keras.Sequential([keras.Input((3,)), keras.layers.Dense(1)])
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model, base=base, period=2)
    model.compile(optimizer, "mse", jit_compile=False, **options)
    return model


OPTIONS: list[dict[str, Any]] = [{}, {"steps_per_execution": 2}, {"run_eagerly": True}]


@pytest.mark.parametrize(
    ("base", "options"),
    selected_cases(
        [(lt.AllReduce(), OPTIONS[0]), (lt.SGP(), OPTIONS[1]), (lt.AllReduce(), OPTIONS[2])],
        [(base, options) for base in (lt.AllReduce(), lt.SGP()) for options in OPTIONS],
    ),
)
def test_fit_raises_what_was_raised(base: Any, options: Any) -> None:
    model = make(base, **options)
    with pytest.raises(lt.NonFiniteError, match="not finite") as error:
        model.fit(X, NAN, batch_size=2, verbose=0)
    if not options:
        lines = "".join(traceback.format_exception(error.value)).splitlines()
        assert len(lines) < 25, lines
    assert "Traceback" not in str(error.value)


def test_fit_continues_after_an_error_that_was_caught() -> None:
    model = make(lt.AllReduce())
    for _ in range(2):
        with pytest.raises(lt.NonFiniteError):
            model.fit(X, NAN, batch_size=2, verbose=0)
    model.fit(X, X.sum(1), batch_size=2, verbose=0)
    assert np.all(np.isfinite(model.get_weights()[0]))


def test_graphs_raise_what_was_raised() -> None:
    model = make(lt.AllReduce())

    @tf.function
    def step(y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(X)[:, 0] - y) ** 2)
        model.optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    with pytest.raises(tf.errors.UnknownError, match="NonFiniteError"):
        step(tf.constant(NAN))
    with pytest.raises(lt.NonFiniteError), lt.original_errors():
        step(tf.constant(NAN))
    with pytest.raises(lt.NonFiniteError):
        lt.original_errors()(step)(tf.constant(NAN))


def test_other_errors_of_tensorflow_stay_what_they_are() -> None:
    @lt.original_errors()
    @tf.function
    def fails(x: Any) -> None:
        tf.debugging.assert_less(x, 0.0, "mine")

    with pytest.raises(tf.errors.InvalidArgumentError, match="mine"):
        fails(tf.constant(1.0))
