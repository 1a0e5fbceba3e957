"""Outer steps with delay, fragments and blend in Keras: eagerly, in a ``tf.function``, and in ``fit``."""

import os
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from case_selection import selected_cases
from keras_training import Vector, make_model
from numpy.testing import assert_allclose

import lentando.tensorflow as lt

DIMENSION, RATE, PERIOD, STEPS = 7, 0.0625, 3, 13  # Keras rounds the rate to float32
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)


@pytest.mark.parametrize(
    ("delay", "blend", "graph"),
    [
        (1, None, True),
        (PERIOD, None, False),
        (2, 0.5, True),
        *selected_cases([], [(1, None, False), (PERIOD, None, True), (2, 0.5, False)]),
    ],
)
def test_slowmo_equals_the_reference(delay: int, blend: float | None, graph: bool) -> None:
    optimizer = lt.SlowMo(
        keras.optimizers.SGD(RATE), period=PERIOD, slow_momentum=0.6, base_buffers="maintain", delay=delay, blend=blend
    )
    found = Vector(START, optimizer, graph).train(QUADRATIC, lt.rank(), STEPS)
    rule = (1.0, 0.6, 0.0, "maintain", False, delay, blend)
    expected = reference.delayed_slowmo(lt.size(), STEPS, START, QUADRATIC, PERIOD, lambda step: RATE, *rule)
    assert_allclose(found, expected[lt.rank()], rtol=0, atol=1e-12)


@pytest.mark.parametrize("graph", [True, *selected_cases([], [False])])
def test_co2_equals_the_reference(graph: bool) -> None:
    optimizer = lt.SlowMo(
        keras.optimizers.SGD(RATE), period=PERIOD, slow_momentum=0.6, base_buffers="maintain", delay=PERIOD,
        gap_penalty=2.0, momentum_clip=0.5,
    )  # fmt: skip
    found = Vector(START, optimizer, graph).train(QUADRATIC, lt.rank(), STEPS)
    rule = (1.0, 0.6, 0.0, "maintain", False, PERIOD, None, 2.0, 0.5)
    expected = reference.delayed_slowmo(lt.size(), STEPS, START, QUADRATIC, PERIOD, lambda step: RATE, *rule)
    assert_allclose(found, expected[lt.rank()], rtol=0, atol=1e-12)


@pytest.mark.parametrize("graph", [True, *selected_cases([], [False])])
def test_a_delay_that_is_chosen_equals_the_reference(graph: bool) -> None:
    optimizer = lt.SlowMo(
        keras.optimizers.SGD(RATE), period=PERIOD, slow_momentum=0.6, base_buffers="maintain", delay="auto"
    )
    steps = 7 * PERIOD + 1
    found = Vector(START, optimizer, graph).train(QUADRATIC, lt.rank(), steps)
    chosen = optimizer.report()["delay"]
    rule = (1.0, 0.6, 0.0, "maintain", False, lambda number: chosen if number >= 5 else PERIOD, None)
    expected = reference.delayed_slowmo(lt.size(), steps, START, QUADRATIC, PERIOD, lambda step: RATE, *rule)
    assert_allclose(found, expected[lt.rank()], rtol=0, atol=1e-12)


@pytest.mark.parametrize("graph", [True, *selected_cases([], [False])])
def test_diloco_in_fragments_equals_the_reference(graph: bool) -> None:
    parts = [keras.Variable(START[:3], dtype="float64"), keras.Variable(START[3:], dtype="float64")]
    optimizer = lt.DiLoCo(keras.optimizers.SGD(RATE), period=4, outer_lr=0.7, outer_momentum=0.9, delay=2, fragments=2)

    def step(first: Any, second: Any) -> None:
        optimizer.apply([first, second], parts)

    take = tf.function(step) if graph else step
    for number in range(STEPS):
        gradient = QUADRATIC(lt.rank(), number, np.concatenate([part.numpy() for part in parts]))
        take(tf.constant(gradient[:3]), tf.constant(gradient[3:]))
    fragments = [(slice(0, 3), 2), (slice(3, DIMENSION), 4)]
    expected = reference.streaming_diloco(
        lt.size(), STEPS, START, QUADRATIC, lambda step: RATE, fragments, 4, 2, 0.7, 0.9, nesterov=True
    )
    found = np.concatenate([part.numpy() for part in parts])
    assert_allclose(found, expected[lt.rank()], rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "settings", [{"delay": 1, "fragments": 2, "blend": 0.5}, *selected_cases([], [{"delay": 2}])], ids=str
)
def test_fit_trains_as_a_loop_does(settings: dict[str, Any]) -> None:
    generator = np.random.default_rng(lt.rank())
    images, labels = generator.normal(size=(44, 5, 5, 1)).astype("float32"), generator.integers(0, 2, 44)

    def compiled(steps_per_execution: int) -> Any:
        model = make_model()
        optimizer = lt.SlowMo(keras.optimizers.SGD(0.05), model=model, period=4, base_buffers="maintain", **settings)
        loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        model.compile(optimizer=optimizer, loss=loss, steps_per_execution=steps_per_execution)
        return model

    results = []
    for steps_per_execution in (1, 3):
        model = compiled(steps_per_execution)
        keras.utils.set_random_seed(1)
        model.fit(images, labels, batch_size=4, shuffle=False, verbose=0)
        results.append([weight.numpy() for weight in model.trainable_variables])
    loop = compiled(1)
    keras.utils.set_random_seed(1)
    for start in range(0, 44, 4):
        loop.train_on_batch(images[start : start + 4], labels[start : start + 4])
    results.append([weight.numpy() for weight in loop.trainable_variables])
    for other in results[1:]:
        for one, same in zip(results[0], other, strict=True):
            assert_allclose(one, same, rtol=1e-5, atol=1e-6)
    assert loop.optimizer.report()["rounds"] == 2
