"""Collectives are not differentiable: a gradient that passes through one is an error."""

from typing import Any

import pytest
import tensorflow as tf

import lentando.tensorflow as lt

CALLS = [lt.allreduce, lt.allgather, lambda tensor: lt.broadcast(tensor, 0)]


def gradient_through(call: Any, weights: Any, *, stopped: bool) -> Any:
    with tf.GradientTape() as tape:
        tensor = 3.0 * weights
        gathered = call(tf.stop_gradient(tensor) if stopped else tensor)
        loss = tf.reduce_sum(gathered) + tf.reduce_sum(weights)
    return tape.gradient(loss, weights)


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("in_graph", [False, True])
def test_gradient_through_a_collective_is_an_error(call: Any, in_graph: bool) -> None:
    weights = tf.Variable([1.0, 1.0])
    through = tf.function(gradient_through) if in_graph else gradient_through
    # While a function is traced TensorFlow makes an error of its own of it, with the same words.
    error = Exception if in_graph else lt.ConfigurationError
    with pytest.raises(error, match="not differentiable here.*stop_gradient"):
        through(call, weights, stopped=False)
    lt.barrier()


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("in_graph", [False, True])
def test_gradient_beside_a_collective_is_there(call: Any, in_graph: bool) -> None:
    weights = tf.Variable([1.0, 1.0])
    through = tf.function(gradient_through) if in_graph else gradient_through
    assert through(call, weights, stopped=True).numpy().tolist() == [1.0, 1.0]


@pytest.mark.parametrize("in_graph", [False, True])
def test_results_have_their_shapes_and_integers_are_taken(in_graph: bool) -> None:
    def both(tensor: Any) -> Any:
        return lt.allreduce(tensor, op=lt.Sum), lt.allgather(tf.cast(tensor, tf.int32))

    total, gathered = (tf.function(both) if in_graph else both)(tf.ones([2]))
    assert total.numpy().tolist() == [lt.size()] * 2
    assert gathered.shape == [2 * lt.size()]
