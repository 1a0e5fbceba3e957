"""Gradients through collectives, with Horovod's definitions: those of reductions are reduced, those of rows go back."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_array_equal

import lentando.tensorflow as lt

SIZE, RANK = lt.size(), lt.rank()
ROWS = 2 * SIZE


def weights(rank: int, rows: int) -> np.ndarray[Any, Any]:
    """Gradient of a rank's loss with respect to a result with this number of rows."""
    return np.arange(2.0 * rows).reshape(rows, 2) + 10 * rank


def mean_of_weights(rows: int) -> Any:
    return sum(weights(rank, rows) for rank in range(SIZE)) / SIZE


def share(rank: int) -> slice:
    return slice(2 * rank, 2 * rank + 2)


CASES: dict[str, tuple[Callable[[Any], Any], Callable[[], Any]]] = {
    "allreduce, average": (lambda t: lt.allreduce(t, name="a"), lambda: mean_of_weights(ROWS)),
    "allreduce, sum": (
        lambda t: lt.allreduce(t, op=lt.Sum, prescale_factor=0.5, postscale_factor=4.0),
        lambda: 2 * SIZE * mean_of_weights(ROWS),
    ),
    "grouped_allreduce": (lambda t: lt.grouped_allreduce([t, 2 * t])[1], lambda: 2 * mean_of_weights(ROWS)),
    "allgather": (
        lambda t: lt.allgather(t, name="b"),
        lambda: mean_of_weights(SIZE * ROWS)[RANK * ROWS : (RANK + 1) * ROWS],
    ),
    "grouped_allgather": (
        lambda t: lt.grouped_allgather([t, tf.fill([RANK, 2], 1.0)])[0],
        lambda: mean_of_weights(SIZE * ROWS)[RANK * ROWS : (RANK + 1) * ROWS],
    ),
    "broadcast": (
        lambda t: lt.broadcast(t, SIZE - 1),
        lambda: mean_of_weights(ROWS) if RANK == SIZE - 1 else np.zeros((ROWS, 2)),
    ),
    "alltoall": (
        lt.alltoall,
        lambda: np.concatenate([weights(rank, ROWS)[share(RANK)] for rank in range(SIZE)]),
    ),
    "reducescatter, sum": (
        lambda t: lt.reducescatter(t, op=lt.Sum, prescale_factor=0.5),
        lambda: np.concatenate([weights(rank, 2) for rank in range(SIZE)]) * SIZE / 2,
    ),
    "grouped_reducescatter, average": (
        lambda t: lt.grouped_reducescatter([t, t])[0],
        lambda: np.concatenate([weights(rank, 2) for rank in range(SIZE)]),
    ),
}


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("in_graph", [False, True])
def test_gradient_through_a_collective(name: str, in_graph: bool) -> None:
    function, expected = CASES[name]
    variable = tf.Variable(np.ones((ROWS, 2)), dtype=tf.float64)

    def gradient() -> Any:
        with tf.GradientTape() as tape:
            result = function(variable)
        upstream = tf.reshape(tf.range(tf.size(result), dtype=tf.float64), tf.shape(result)) + 10.0 * RANK
        return tape.gradient(result, variable, upstream)

    assert_array_equal((tf.function(gradient) if in_graph else gradient)(), expected())


@pytest.mark.parametrize("op", [lt.Min, lt.Max])
def test_a_gradient_that_is_not_defined_is_an_error(op: Any) -> None:
    variable = tf.Variable([1.0])
    with tf.GradientTape() as tape:
        result = lt.allreduce(variable, op=op)
    with pytest.raises(lt.ConfigurationError, match=f"op={op.name} has no gradient"):
        tape.gradient(result, variable)
    lt.barrier()


def test_gradient_of_a_gradient() -> None:
    variable = tf.Variable(3.0)
    with tf.GradientTape() as outer:
        with tf.GradientTape() as inner:
            cube = lt.allreduce(variable**3)
        slope = inner.gradient(cube, variable)
    assert outer.gradient(slope, variable) == 18.0
