"""Base optimizers whose state begins as a copy of the weights begin with those that all ranks have."""

from pathlib import Path
from typing import Any

import keras
import keras_training  # noqa: F401 - quiets TensorFlow
import numpy as np
import pytest
import tensorflow as tf
from case_selection import selected_cases

import lentando.tensorflow as lt

ScheduleFree = keras.optimizers.ScheduleFreeAdamW


class Anchored(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Pulls weights back to where they began. Cannot be made from its configuration, as users' classes often."""

    def __init__(self, learning_rate: Any, pull: float) -> None:
        super().__init__(learning_rate=learning_rate)
        self.pull = pull

    def build(self, variables: Any) -> None:
        super().build(variables)
        self.starts = self.add_optimizer_variables(variables, "start")
        for start, variable in zip(self.starts, variables, strict=True):
            start.assign(variable)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> None:
        start = self.starts[self._get_variable_index(variable)]
        self.assign_sub(variable, learning_rate * (gradient + self.pull * (variable - start)))


def make_model(built: bool = True) -> keras.Model:
    """Another start on each rank."""
    keras.utils.set_random_seed(lt.rank())
    layers = [keras.layers.Dense(3), keras.layers.Dense(1, use_bias=False)]
    return keras.Sequential([keras.Input((4,)), *layers] if built else layers)


def data(seed: int = 0) -> Any:
    x = np.random.default_rng([lt.rank(), seed]).normal(size=(24, 4)).astype("float32")
    return x, x.sum(1)


def assert_equal_everywhere(model: keras.Model) -> None:
    for variable in model.weights:
        for other in lt.allgather_object(variable.numpy()):
            np.testing.assert_array_equal(other, variable.numpy())
        assert np.any(variable.numpy() != 0)


WAYS = [
    (lambda: ScheduleFree(0.01), "before wrapping"),
    (lambda: Anchored(0.01, 0.5), "before wrapping"),
    (lambda: ScheduleFree(0.01), "by fit"),
    (lambda: ScheduleFree(0.01), "by a graph"),
]


@pytest.mark.parametrize(("make", "built"), WAYS)
def test_synchronous_training_keeps_replicas_equal(make: Any, built: str) -> None:
    model = make_model(built == "before wrapping")
    optimizer = lt.DistributedOptimizer(make(), model=model)
    x, y = data()
    if built == "by a graph":

        @tf.function
        def step(x: Any, y: Any) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x)[:, 0] - y) ** 2)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        for _ in range(3):
            step(tf.constant(x), tf.constant(y))
    else:
        model.compile(optimizer, "mse", jit_compile=False)
        model.fit(x, y, batch_size=8, verbose=0)
    assert_equal_everywhere(model)
    assert optimizer.report()["inner_steps"] == 3


def test_values_that_a_users_class_makes_of_weights_without_values_are_refused() -> None:
    model = make_model(built=False)
    model.compile(lt.DistributedOptimizer(Anchored(0.01, 0.5), model=model), "mse", jit_compile=False)
    with pytest.raises(lt.ConfigurationError, match="build the model first"):
        model.fit(*data(), verbose=0)


def test_weights_that_are_loaded_after_wrapping_are_where_it_begins() -> None:
    model, plain = make_model(), make_model()
    start = [np.full(w.shape, 0.25, np.float32) for w in model.get_weights()]
    optimizer = lt.DistributedOptimizer(ScheduleFree(0.01), model=model)
    base = ScheduleFree(0.01)
    model.set_weights(start)
    plain.set_weights(start)
    for _ in range(2):
        gradients = [np.ones(v.shape, np.float32) for v in model.trainable_variables]
        optimizer.apply(gradients, model.trainable_variables)
        base.apply(gradients, plain.trainable_variables)
    for mine, theirs in zip(model.get_weights(), plain.get_weights(), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-6)


@pytest.mark.parametrize(
    ("base", "way"),
    [
        (lt.LocalSGD(), "graph"),
        (lt.SGP(), "eager"),
        *selected_cases([], [(lt.LocalSGD(), "eager"), (lt.SGP(), "graph")]),
    ],
)
def test_reset_begins_again_from_the_weights_of_the_outer_step(way: str, base: Any) -> None:
    """Weights that begin at zero look like any other state that begins at zero."""
    variable = keras.Variable(np.zeros((2, 3), np.float32), name="weights")
    optimizer = lt.DistributedOptimizer(ScheduleFree(0.1), base=base, period=2, base_buffers="reset")

    def step(gradient: Any) -> None:
        optimizer.apply([gradient], [variable])

    run = tf.function(step) if way == "graph" else step
    for number in range(4):
        run(tf.fill([2, 3], float(lt.rank() + 1 + number)))
    by_name = {v.name: v.numpy() for v in optimizer.base_optimizer.variables}
    np.testing.assert_array_equal(by_name["weights_momentum"], variable.numpy())
    np.testing.assert_array_equal(by_name["weights_velocity"], 0)
    assert by_name["iteration"] == 0
    assert np.all(variable.numpy() < -0.1)


def test_reset_of_a_users_class_begins_again_from_the_weights() -> None:
    model = make_model()
    optimizer = lt.SlowMo(Anchored(0.1, 0.5), model=model, period=2)
    for _ in range(2):
        optimizer.apply([np.ones(v.shape, np.float32) for v in model.trainable_variables], model.trainable_variables)
    for start, variable in zip(optimizer.base_optimizer.starts, model.trainable_variables, strict=True):
        np.testing.assert_array_equal(start.numpy(), variable.numpy())


def test_new_state_of_a_loaded_checkpoint_begins_with_its_weights(shared_path: Path) -> None:
    saved, model = make_model(), make_model()
    optimizer = lt.DistributedOptimizer(ScheduleFree(0.1), model=saved)
    optimizer.apply([np.ones(v.shape, np.float32) for v in saved.trainable_variables], saved.trainable_variables)
    lt.save(shared_path, optimizer)
    again = lt.DistributedOptimizer(ScheduleFree(0.1), model=model)
    model.set_weights([w + 1 for w in model.get_weights()])
    lt.load(shared_path, again, optimizer_state="new")
    slots = {v.name: v.numpy() for v in again.base_optimizer.variables}
    for variable in model.trainable_variables:
        np.testing.assert_array_equal(slots[f"{variable.path.replace('/', '_')}_momentum"], variable.numpy())
