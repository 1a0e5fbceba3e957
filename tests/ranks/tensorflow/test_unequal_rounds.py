"""Rounds in which the ranks take unequally many steps, in Keras: eagerly, and in a ``tf.function``."""

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
import reference
from keras_training import Vector
from numpy.testing import assert_allclose

import lentando.tensorflow as lt

DIMENSION, RATE = 7, 0.0625  # Keras rounds the rate to float32
START = np.linspace(-1, 1, DIMENSION)


def constant(worker: int, step: int, x: Any) -> Any:
    """Another gradient on each rank, the same in every step: Keras counts the steps of each rank."""
    return x + worker


@pytest.mark.parametrize(("graph", "weighting"), [(False, "steps"), (True, "normalized")])
def test_slowmo_equals_the_reference(graph: bool, weighting: Any) -> None:
    steps = [4 - rank % 3 for rank in range(lt.size())]
    optimizer = lt.SlowMo(
        keras.optimizers.SGD(RATE), period=lt.StepsByRank(steps), slow_momentum=0.6, base_buffers="maintain",
        weighting=weighting,
    )  # fmt: skip
    found = Vector(START, optimizer, graph).train(constant, lt.rank(), 3 * steps[lt.rank()])
    assert optimizer.rounds == 3
    expected = reference.unequal_slowmo(3, START, constant, lambda number: steps, RATE, 1.0, 0.6, weighting)
    assert_allclose(found, expected, rtol=0, atol=1e-12)
