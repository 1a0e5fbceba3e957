"""Averages of gradients in a graph: bit for bit those of eager steps, in memory that no later step changes."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import lentando.tensorflow as lt

pytestmark = pytest.mark.filterwarnings("ignore:Gradients do not exist")  # of the variable without one

SIZE, RANK = lt.size(), lt.rank()
STEPS = 3
SHAPES = {
    "number": ([], "float32"),
    "small": ([3, 2], "float32"),
    "large": ([200, 200], "float32"),  # its memory is aligned before TensorFlow adopts it
    "double": ([5], "float64"),
    "large double": ([3, 100, 100], "float64"),
    "half": ([7], "float16"),
    "short": ([2, 2], "bfloat16"),
    "unused": ([4], "float32"),
    "rows": ([6, 2], "float32"),
    "empty": ([0, 3], "float32"),
}


@keras.saving.register_keras_serializable("lentando_tests")
class KeepsGradients(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Keeps the last two gradients of each variable, and takes no step. A variable adopts the memory of a gradient."""

    def build(self, variables: Any) -> None:
        """Create two variables for each."""
        if self.built:
            return
        super().build(variables)
        self.latest = [self.add_variable_from_reference(v, "latest") for v in variables]
        self.previous = [self.add_variable_from_reference(v, "previous") for v in variables]

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        """Keep a gradient."""
        number = self._get_variable_index(variable)
        self.assign(self.previous[number], self.latest[number])
        self.assign(self.latest[number], gradient)


def gradient(name: str, step: int, rank: int) -> Any:
    shape, dtype = SHAPES[name]
    values = np.random.default_rng([step, rank]).normal(size=shape) * 10
    return tf.cast(tf.convert_to_tensor(values), dtype)


def gradients(step: int) -> list[Any]:
    """Gradients of this rank: none of one variable, and that of the rows as TensorFlow gives it of an embedding."""
    by_name: dict[str, Any] = {name: gradient(name, step, RANK) for name in SHAPES}
    by_name["unused"] = None
    by_name["rows"] = tf.IndexedSlices(by_name["rows"][:2], tf.constant([RANK, 5]), tf.constant([6, 2]))
    return list(by_name.values())


def kept(in_graph: bool) -> tuple[list[Any], list[Any]]:
    """The gradients that the base optimizer was given in the last two steps."""
    variables = [tf.Variable(tf.zeros(shape, dtype)) for shape, dtype in SHAPES.values()]
    base = KeepsGradients(learning_rate=1.0)
    optimizer = lt.DistributedOptimizer(base)

    def step(given: list[Any]) -> None:
        optimizer.apply(given, variables)

    take = tf.function(step) if in_graph else step
    for number in range(STEPS):
        take(gradients(number))
    return [v.numpy() for v in base.previous], [v.numpy() for v in base.latest]


@pytest.fixture(scope="module")
def in_graph() -> tuple[list[Any], list[Any]]:
    return kept(in_graph=True)


def test_averages_are_those_of_eager_steps_bit_for_bit(in_graph: tuple[list[Any], list[Any]]) -> None:
    for graph, eager in zip(in_graph, kept(in_graph=False), strict=True):
        for name, one, other in zip(SHAPES, graph, eager, strict=True):
            assert one.dtype == other.dtype, name
            assert one.tobytes() == other.tobytes(), name


@pytest.mark.parametrize("step", [STEPS - 2, STEPS - 1])
def test_averages_are_means_of_their_own_step(in_graph: tuple[list[Any], list[Any]], step: int) -> None:
    """The memory of an average is adopted by a variable, and the next average must not be written there."""
    averages = dict(zip(SHAPES, in_graph[step - STEPS + 2], strict=True))
    assert not averages.pop("unused").any()
    rows = averages.pop("rows")
    expected = np.zeros((6, 2), np.float32)
    for rank in range(SIZE):
        sent = gradient("rows", step, rank).numpy()
        expected[rank] += sent[0] / SIZE
        expected[5] += sent[1] / SIZE
    np.testing.assert_allclose(rows, expected, rtol=1e-5)
    for name, average in averages.items():
        mean = sum(gradient(name, step, rank).numpy().astype(np.float64) for rank in range(SIZE)) / SIZE
        tolerance = {"float64": 1e-12, "float32": 1e-4, "float16": 1e-2, "bfloat16": 1e-1}[SHAPES[name][1]]
        np.testing.assert_allclose(average.astype(np.float64), mean, rtol=tolerance, atol=tolerance, err_msg=name)
