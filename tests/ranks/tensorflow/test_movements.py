"""Outer steps and gradients in few bits, and weights by samples, in Keras."""

from typing import Any

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from case_selection import selected_cases
from numpy.testing import assert_allclose
from quantized_reference import QuantizedRounds, quantized

import lentando.tensorflow as lt

DIMENSION, RATE, PERIOD = 700, 0.125, 3
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)


CASES = selected_cases(
    [("int8", 127, True), ("int4", 7, False)],
    [(*level, compiled) for level in (("int8", 127), ("int4", 7)) for compiled in (False, True)],
)


def trained(optimizer: Any, steps: int, *, compiled: bool) -> Any:
    variable = keras.Variable(START, dtype="float64", name="x")

    def step(gradient: Any, samples: Any) -> None:
        optimizer.apply([gradient], [variable], samples=samples)

    take = tf.function(step) if compiled else step
    for number in range(steps):
        take(tf.constant(QUADRATIC(lt.rank(), number, variable.numpy())), tf.constant(1 + lt.rank()))
    return variable.numpy()


@pytest.mark.parametrize(("name", "levels", "compiled"), CASES)
def test_slowmo_with_weights_equals_an_independent_reference(name: Any, levels: int, compiled: bool) -> None:
    optimizer = lt.SlowMo(
        keras.optimizers.SGD(RATE), period=PERIOD, slow_momentum=0.0, wire_dtype=name, weighting="samples"
    )
    found = trained(optimizer, 3 * PERIOD + 1, compiled=compiled)
    factors = [2 * (1 + rank) / (1 + lt.size()) for rank in range(lt.size())]
    rounds = QuantizedRounds(START, lt.size(), lambda v: quantized(v, levels))
    x = [START] * lt.size()
    for step in range(3 * PERIOD + 1):
        x = [own - RATE * QUADRATIC(rank, step, own) for rank, own in enumerate(x)]
        if (step + 1) % PERIOD == 0:
            x = [rounds.end(x, factors)] * lt.size()
    assert_allclose(found, x[lt.rank()], rtol=0, atol=1e-12)


@pytest.mark.parametrize(("name", "levels", "compiled"), CASES)
def test_gradients_are_the_same_on_all_ranks_and_close_to_the_mean(name: Any, levels: int, compiled: bool) -> None:
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(RATE), base=lt.AllReduce(wire_dtype=name))
    found = trained(optimizer, 20, compiled=compiled)
    assert all(other == found.tolist() for other in lt.allgather_object(found.tolist()))
    x = START
    for step in range(20):
        x = x - RATE * np.mean([QUADRATIC(rank, step, x) for rank in range(lt.size())], axis=0)
    assert_allclose(found, x, rtol=0, atol=4 * RATE / levels)


def test_fit_with_int4_leaves_equal_replicas() -> None:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.Input([6]), keras.layers.Dense(9, "relu"), keras.layers.Dense(1)])
    optimizer = lt.SlowMo(keras.optimizers.SGD(0.05), model=model, period=2, wire_dtype="int4")
    model.compile(optimizer, "mse")
    random = np.random.default_rng(lt.rank())
    model.fit(random.normal(size=(32, 6)), random.normal(size=(32, 1)), batch_size=8, epochs=2, verbose=0)
    weights = [weight.tolist() for weight in model.get_weights()]
    assert all(other == weights for other in lt.allgather_object(weights))
