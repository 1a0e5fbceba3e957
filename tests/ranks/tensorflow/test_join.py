"""Uneven data in TensorFlow: ``with lt.join(optimizer):`` round loops, graphs and ``fit`` of unequal length."""

from typing import Any

import keras
import keras_training
import numpy as np
import pytest
import reference
import tensorflow as tf
from case_selection import selected_cases
from keras_training import Vector, make_model
from numpy.testing import assert_allclose

import lentando.tensorflow as lt

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
LR = 0.125  # Keras passes learning rates and momenta through float32: numbers that it holds exactly
WAYS = ["eager", "graph"]


def counts() -> list[int]:
    """Of batches, by rank: none on the first of several."""
    return [4 * rank % 11 for rank in range(lt.size())] if lt.size() > 1 else [6]


def built(optimizer: lt.DistributedOptimizer, way: str) -> Vector:
    """A rank without batches takes no step that would build it."""
    trained = Vector(START, optimizer, graph=way == "graph")
    optimizer.build([trained.variable])
    return trained


def train_joined(trained: Vector) -> Any:
    with lt.join(trained.optimizer):
        trained.train(QUADRATIC, lt.rank(), counts()[lt.rank()])
    return trained.value


def assert_equal_on_all_ranks(variables: Any) -> None:
    for variable in variables:
        for other in lt.allgather_object(variable.numpy()):
            np.testing.assert_array_equal(other, variable.numpy(), variable.path)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("momentum", [0.0, 0.5])
def test_slowmo_averages_over_the_ranks_that_took_steps(way: str, momentum: float) -> None:
    optimizer = lt.SlowMo(keras.optimizers.SGD(LR), period=4, slow_lr=0.75, slow_momentum=momentum)
    x = train_joined(built(optimizer, way))
    expected = reference.uneven_slowmo(counts(), START, QUADRATIC, 4, lambda _: LR, 0.75, momentum)
    assert_allclose(x, expected.x[0], rtol=1e-11, atol=1e-11)
    assert optimizer.report()["inner_steps"] == max(counts())


@pytest.mark.parametrize("way", WAYS)
def test_graph_continues_after_join(way: str) -> None:
    """It knows again how many steps it may take automatically."""
    optimizer = lt.SlowMo(keras.optimizers.SGD(LR), period=4, slow_momentum=0.5)
    trained = built(optimizer, way)
    x = train_joined(trained)
    for _ in range(2):
        trained.train(QUADRATIC, lt.rank(), 4)
        assert_equal_on_all_ranks([trained.variable])
    assert optimizer.report()["inner_steps"] == max(counts()) + 8
    assert not np.array_equal(x, trained.value)


@pytest.mark.parametrize("way", WAYS)
def test_gradients_are_averaged_over_the_ranks_that_have_some(way: str) -> None:
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(LR, momentum=0.75))
    trained = built(optimizer, way)
    expected = reference.uneven_synchronous_sgd(counts(), START, QUADRATIC, lambda _: LR, 0.75)
    assert_allclose(train_joined(trained), expected, rtol=1e-11)
    assert int(optimizer.iterations) == max(counts())
    assert_equal_on_all_ranks(optimizer.variables)


def test_ended_ranks_step_along_at_the_others_learning_rates() -> None:
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(0.5))
    trained = built(optimizer, "eager")

    def rate(step: int) -> float:
        return 0.125 * (1 + step % 3)

    with lt.join(optimizer):
        for step in range(counts()[lt.rank()]):
            optimizer.learning_rate = rate(step)
            trained.step(QUADRATIC(lt.rank(), step, trained.value))
    expected = reference.uneven_synchronous_sgd(counts(), START, QUADRATIC, rate)
    assert_allclose(trained.value, expected, rtol=1e-11)
    own = counts()[lt.rank()]
    assert float(optimizer.learning_rate) == (rate(own - 1) if own else 0.5)


@pytest.mark.parametrize("way", WAYS)
def test_accumulated_gradients_are_averaged_over_the_ranks_that_have_some(way: str) -> None:
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(LR, gradient_accumulation_steps=2))
    trained = built(optimizer, way)
    with lt.join(optimizer):
        for batch in range(2 * counts()[lt.rank()]):
            step, at = divmod(batch, 2)
            x = trained.value
            trained.step(QUADRATIC(lt.rank(), step, x) * (0.5 if at else 1.5))
    expected = reference.uneven_synchronous_sgd(counts(), START, QUADRATIC, lambda _: LR)
    assert_allclose(trained.value, expected, rtol=1e-11)


@pytest.mark.parametrize("way", WAYS)
def test_gossip_continues_through_ranks_that_have_ended(way: str) -> None:
    topology = lt.StaticExponential()
    trained = built(lt.DistributedOptimizer(keras.optimizers.SGD(LR), base=lt.SGP(topology)), way)
    expected = reference.push_sum_sgd(
        lt.size(),
        max(counts()),
        START,
        reference.until(counts(), QUADRATIC),
        topology.for_size(lt.size()).mixing_matrix,
        LR,
    )
    assert_allclose(train_joined(trained), expected.z[lt.rank()], rtol=1e-11, atol=1e-11)


METHODS: dict[str, Any] = {
    "all-reduce": lambda model: lt.DistributedOptimizer(keras.optimizers.Adam(0.01), model=model),
    "local": lambda model: lt.SlowMo(keras.optimizers.SGD(0.05), model=model, period=3),
    "overlap": lambda model: lt.SlowMo(keras.optimizers.SGD(0.05), model=model, base=lt.OSGP(), period=3),
    "adacomm": lambda model: lt.AdaComm(keras.optimizers.SGD(0.05), model=model, initial_period=3, interval_steps=3),
}


@pytest.mark.parametrize(
    ("method", "way"),
    [
        ("all-reduce", "fit"),
        ("local", "eager"),
        ("overlap", "graph"),
        *selected_cases([], [("local", "fit"), ("adacomm", "fit")]),
    ],
)
def test_replicas_of_a_model_leave_join_together(method: str, way: str) -> None:
    model = make_model()
    optimizer = METHODS[method](model)
    own = counts()[lt.rank()]
    with lt.join(optimizer):
        if own:
            keras_training.train(model, optimizer, lt.rank(), own, way=way)
    assert_equal_on_all_ranks(model.trainable_variables)
    assert optimizer.report()["inner_steps"] == max(counts())
    with lt.join(optimizer):
        keras_training.train(model, optimizer, lt.rank(), 1 + lt.rank(), way=way)
    assert_equal_on_all_ranks(model.trainable_variables)


def test_epochs_of_fit_may_be_of_unequal_length() -> None:
    model = make_model()
    optimizer = METHODS["local"](model)
    model.compile(optimizer=optimizer, loss=keras_training.cross_entropy)
    images, labels = next(keras_training.batches(lt.rank(), 1))
    with lt.join(optimizer):
        model.fit(images[: 2 + lt.rank()], labels[: 2 + lt.rank()], batch_size=1, epochs=3, verbose=0)
    assert_equal_on_all_ranks(model.trainable_variables)
    assert optimizer.report()["inner_steps"] == 3 * (1 + lt.size())


def test_optimizer_must_be_built_before_join() -> None:
    with (
        pytest.raises(lt.ConfigurationError, match="has not been built"),
        lt.join(lt.DistributedOptimizer(keras.optimizers.SGD(LR))),
    ):
        tf.print("never")
