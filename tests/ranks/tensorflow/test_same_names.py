"""Several variables of one name: each is sent, averaged, reset and saved."""

from pathlib import Path
from typing import Any

import keras
import keras_training  # noqa: F401 - quiets TensorFlow
import numpy as np
import pytest
import tensorflow as tf

import lentando.tensorflow as lt


def unnamed(count: int = 3) -> list[Any]:
    """Variables of one name and shape, with other values on each rank."""
    return [tf.Variable([float(10 * lt.rank() + number)] * 2) for number in range(count)]


def factory() -> keras.Model:
    """A teacher or a student."""
    layers = [keras.layers.Dense(2, name="first"), keras.layers.Dense(2, name="second")]
    model = keras.Sequential([keras.Input((2,)), *layers], name="network")
    model.set_weights([np.full(w.shape, lt.rank() + 1.0 + n) for n, w in enumerate(model.get_weights())])
    return model


def gradients(variables: Any) -> list[Any]:
    return [np.full(v.shape, lt.rank() + number, np.float32) for number, v in enumerate(variables)]


def everywhere(variables: Any) -> list[Any]:
    return lt.allgather_object([v.numpy().tolist() for v in variables])


def test_broadcast_of_unnamed_variables() -> None:
    variables = unnamed()
    lt.broadcast_variables(variables, 0)
    assert [v.numpy().tolist() for v in variables] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


def test_broadcast_of_teacher_and_student() -> None:
    teacher, student = factory(), factory()
    student.set_weights([w * 100 for w in student.get_weights()])
    lt.broadcast_variables([*teacher.weights, *student.weights], lt.size() - 1)
    for factor, model in ((1, teacher), (100, student)):
        for number, w in enumerate(model.get_weights()):
            np.testing.assert_array_equal(w, factor * (lt.size() + number))


def test_broadcast_in_a_graph() -> None:
    variables = unnamed()

    @tf.function
    def send() -> None:
        lt.broadcast_variables(variables, 0)

    send()
    assert [v.numpy().tolist() for v in variables] == [[0.0, 0.0], [1.0, 1.0], [2.0, 2.0]]


@pytest.mark.parametrize("make", [unnamed, lambda: [*factory().weights, *factory().weights]])
@pytest.mark.parametrize("base_buffers", ["reset", "average"])
def test_wrapper_averages_each_and_its_momentum(make: Any, base_buffers: Any) -> None:
    variables = make()
    optimizer = lt.SlowMo(keras.optimizers.SGD(0.5, momentum=0.5), period=2, base_buffers=base_buffers)
    for _ in range(2):
        optimizer.apply(gradients(variables), variables)
    assert all(other == everywhere(variables)[0] for other in everywhere(variables))
    momenta = [v for v in optimizer.base_optimizer.variables if v.name.endswith("momentum")]
    assert len(momenta) == len(variables)
    means = [(lt.size() - 1) / 2 + number for number in range(len(variables))]
    for momentum, mean in zip(momenta, means, strict=True):
        expected = 0.0 if base_buffers == "reset" else -0.5 * 1.5 * mean
        np.testing.assert_allclose(momentum.numpy(), expected, rtol=1e-6)


def test_checkpoint_holds_the_momentum_of_each(shared_path: Path) -> None:
    def trained(variables: Any, optimizer: Any, steps: int) -> Any:
        for _ in range(steps):
            optimizer.apply(gradients(variables), variables)
        return [v.numpy().tolist() for v in variables]

    def make() -> Any:
        return unnamed(), lt.SlowMo(keras.optimizers.SGD(0.5, momentum=0.5), period=3, base_buffers="maintain")

    variables, optimizer = make()
    trained(variables, optimizer, 2)
    lt.save(shared_path, optimizer)
    expected = trained(variables, optimizer, 3)
    again, other = make()
    other.build(again)
    lt.load(shared_path, other)
    assert trained(again, other, 3) == expected
