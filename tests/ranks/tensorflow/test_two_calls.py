"""Several communicating calls in one ``tf.function``, as in a GAN: they pair with the other ranks' in program order."""

from typing import Any

import keras
import keras_training  # noqa: F401 - quiets TensorFlow
import numpy as np
import pytest
import tensorflow as tf

import lentando.tensorflow as lt

STEPS = 15
SIZE = 8


def make_model() -> keras.Model:
    keras.utils.set_random_seed(lt.rank())
    return keras.Sequential([keras.Input((SIZE,)), keras.layers.Dense(SIZE), keras.layers.Dense(SIZE)])


def synchronous(model: keras.Model) -> Any:
    return lt.DistributedOptimizer(keras.optimizers.SGD(0.01), model=model)


def slowmo(model: keras.Model) -> Any:
    return lt.SlowMo(keras.optimizers.Adam(0.01), model=model, period=3, base_buffers="maintain")


def batch(step: int) -> Any:
    return tf.constant(np.random.default_rng([lt.rank(), step]).normal(size=(4, SIZE)).astype("float32"))


def assert_equal_everywhere(*models: keras.Model) -> None:
    for model in models:
        for variable in model.weights:
            for other in lt.allgather_object(variable.numpy()):
                np.testing.assert_array_equal(other, variable.numpy())


class Pair:
    """A generator and a discriminator of the same shapes, and one function that steps both.

    Args:
        wrap: makes the optimizer of a model.
        graph: whether the function is a graph.
    """

    def __init__(self, wrap: Any, graph: bool) -> None:
        self.models = make_model(), make_model()
        self.optimizers = tuple(wrap(model) for model in self.models)
        self.step = tf.function(self._step) if graph else self._step

    def _step(self, x: Any) -> Any:
        for sign, model, optimizer in zip((1, -2), self.models, self.optimizers, strict=True):
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - sign * x) ** 2)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables, loss=loss)
        return lt.allreduce(loss)


@pytest.mark.parametrize("wrap", [synchronous, slowmo])
def test_two_optimizers_and_a_collective_in_one_graph_equal_eager_steps(wrap: Any) -> None:
    graph, eager = Pair(wrap, graph=True), Pair(wrap, graph=False)
    for step in range(STEPS):
        np.testing.assert_allclose(graph.step(batch(step)).numpy(), eager.step(batch(step)).numpy(), rtol=1e-5)
    assert_equal_everywhere(*graph.models)
    for one, other in zip(graph.models, eager.models, strict=True):
        for mine, theirs in zip(one.get_weights(), other.get_weights(), strict=True):
            np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=1e-5)


def test_two_optimizers_in_a_train_step_of_fit() -> None:
    generator, discriminator = make_model(), make_model()

    class Gan(keras.Model):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self.generator, self.discriminator = generator, discriminator

        def train_step(self, data: Any) -> Any:
            x, _ = data
            for model, optimizer in ((discriminator, self.other), (generator, self.optimizer)):
                with tf.GradientTape() as tape:
                    loss = tf.reduce_mean((model(x) - x) ** 2)
                optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables, loss=loss)
            return {"loss": lt.allreduce(loss)}

    gan = Gan()
    gan.other = slowmo(discriminator)
    gan.compile(optimizer=synchronous(generator), jit_compile=False)
    x = np.concatenate([batch(step).numpy() for step in range(12)])
    losses = gan.fit(x, x, batch_size=4, verbose=0).history["loss"]
    assert len(set(lt.allgather_object(losses[0]))) == 1
    assert_equal_everywhere(generator, discriminator)


def test_two_optimizers_in_branches_and_loops() -> None:
    pair = Pair(synchronous, graph=False)
    (first, second), (one, other) = pair.models, pair.optimizers

    def step(model: keras.Model, optimizer: Any, x: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - x) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)
        return lt.allreduce(loss)

    @tf.function
    def train(x: Any) -> Any:
        total = tf.constant(0.0)
        for number in tf.range(6):
            if number % 3 < 2:
                total += step(first, one, x)
            total += step(second, other, x)
        return total

    totals = [float(train(batch(number))) for number in range(3)]
    assert len({tuple(other) for other in lt.allgather_object(totals)}) == 1
    assert_equal_everywhere(first, second)
    assert [one.report()["inner_steps"], other.report()["inner_steps"]] == [12, 18]
