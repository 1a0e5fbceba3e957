"""Losses that users give with a step, and that are not one number."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf

import lentando.tensorflow as lt

METHODS: dict[str, dict[str, Any]] = {"allreduce": {}, "local sgd": {"base": lt.LocalSGD(), "period": 2}}


def make(method: str) -> tuple[lt.DistributedOptimizer, Any]:
    variable = keras.Variable(np.ones(3, np.float32))
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(0.1), **METHODS[method])
    optimizer.build([variable])
    return optimizer, variable


@pytest.mark.parametrize("loss", [tf.ones(8), np.ones((2, 1)), tf.ones(0), [1.0, 2.0]])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("in_graph", [False, True])
def test_loss_of_several_numbers_is_refused_with_its_shape(loss: Any, method: str, in_graph: bool) -> None:
    optimizer, variable = make(method)

    def step(loss: Any) -> None:
        optimizer.apply([tf.ones(3)], [variable], loss=loss)

    shape = str(tuple(np.shape(loss))).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(lt.ConfigurationError, match=f"loss= must be one number.*got shape {shape}"):
        (tf.function(lambda: step(loss)) if in_graph else lambda: step(loss))()
    step(tf.ones(1))
    step(0.5)
    assert optimizer.report()["inner_steps"] == 2


def test_loss_whose_length_the_graph_does_not_know_is_refused() -> None:
    optimizer, variable = make("local sgd")

    @tf.function(input_signature=[tf.TensorSpec([None])])
    def step(losses: Any) -> None:
        optimizer.apply([tf.ones(3)], [variable], loss=losses)

    with pytest.raises(Exception, match=r"ConfigurationError: loss= must be one number.*got shape \(None,\)"):
        step(tf.ones(4))


@pytest.mark.parametrize("in_graph", [False, True])
def test_a_step_that_is_not_taken_leaves_no_loss_behind(in_graph: bool) -> None:
    variable = keras.Variable(np.ones(3, np.float32))
    optimizer = lt.AdaComm(keras.optimizers.SGD(0.1), base=lt.AllReduce(), initial_period=2, interval_steps=2)
    optimizer.build([variable])

    def apply(gradient: Any) -> None:
        optimizer.apply([gradient], [variable], loss=1.0)

    step = tf.function(apply) if in_graph else apply
    step(tf.ones(3))
    with pytest.raises(Exception, match="the step is not taken"):
        step(tf.fill([3], np.float32("nan")))
    for _ in range(3):
        step(tf.ones(3))
    assert (optimizer.report()["inner_steps"], optimizer.report()["rounds"]) == (4, 2)
