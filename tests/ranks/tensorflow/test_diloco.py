"""``lt.DiLoCo`` of Keras against the reference, with a schedule inside."""

from typing import Any

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from numpy.testing import assert_allclose

import lentando.tensorflow as lt

DIMENSION, PERIOD, STEPS = 7, 4, 20
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize(("momentum", "nesterov"), [(0.9, True), (0.5, False)])
def test_outer_step_does_not_depend_on_the_inner_rate(momentum: float, nesterov: bool, compiled: bool) -> None:
    variable = keras.Variable(START, dtype="float64", name="x")
    schedule = keras.optimizers.schedules.CosineDecay(0.1, STEPS)
    optimizer = lt.DiLoCo(
        keras.optimizers.SGD(schedule), period=PERIOD, outer_lr=0.7, outer_momentum=momentum, nesterov=nesterov
    )

    def step(gradient: Any) -> None:
        optimizer.apply([gradient], [variable])

    take = tf.function(step) if compiled else step
    for number in range(STEPS):
        take(tf.constant(QUADRATIC(lt.rank(), number, variable.numpy())))

    def rate(number: int) -> float:
        return float(schedule(number))

    expected = reference.diloco(lt.size(), STEPS, START, QUADRATIC, PERIOD, rate, 0.7, momentum, nesterov)
    assert_allclose(variable.numpy(), expected, rtol=1e-6)  # the schedule computes in float32
