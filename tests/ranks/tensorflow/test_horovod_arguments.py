"""Arguments of Horovod's ``DistributedOptimizer`` in Keras: backward passes, local variables, ops, process sets."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

import lentando.tensorflow as lt

SIZE, RANK = lt.size(), lt.rank()
MEAN = (SIZE + 1) / 2


@pytest.fixture(params=[False, True])
def in_graph(request: pytest.FixtureRequest) -> Any:
    return request.param


def steps(optimizer: Any, variables: Any, gradients: Any, count: int, in_graph: bool) -> None:
    """Take steps with the gradients, each multiplied by rank + 1."""
    optimizer.build(variables)

    def step(factor: Any) -> None:
        optimizer.apply([factor * gradient for gradient in gradients], variables)

    for _ in range(count):
        (tf.function(step) if in_graph else step)(tf.constant(RANK + 1.0))


@pytest.mark.filterwarnings("ignore:Gradients do not exist")
@pytest.mark.parametrize("takes_mean", [False, True])
def test_several_backward_passes_take_one_step(takes_mean: bool, in_graph: bool) -> None:
    weight, unused = tf.Variable([1.0, 2.0]), tf.Variable([5.0])
    optimizer = lt.DistributedOptimizer(
        keras.optimizers.SGD(1.0), backward_passes_per_step=3, average_aggregated_gradients=takes_mean
    )
    optimizer.build([weight, unused])

    def step(factor: Any) -> None:
        optimizer.apply([factor * tf.constant([1.0, 2.0]), None], [weight, unused])

    function = tf.function(step) if in_graph else step
    found = []
    for number in range(7):
        function(tf.constant((RANK + 1.0) * (number + 1)))
        found.append(weight.numpy().tolist())
    of_passes = [np.array(sum(range(first, first + 3))) / (3 if takes_mean else 1) for first in (1, 4)]
    after_first = np.array([1.0, 2.0]) * (1 - of_passes[0] * MEAN)
    after_second = after_first - np.array([1.0, 2.0]) * of_passes[1] * MEAN
    assert_allclose(found, [[1, 2]] * 2 + [after_first] * 3 + [after_second] * 2)
    assert unused.numpy() == [5]
    assert optimizer.report()["inner_steps"] == 2


def test_fit_with_several_backward_passes() -> None:
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False, kernel_initializer="ones")])
    model.compile(lt.DistributedOptimizer(keras.optimizers.SGD(0.5), backward_passes_per_step=2), "mse")
    model.fit(np.full([4, 1], RANK), np.zeros([4, 1]), batch_size=2, verbose=0)
    slopes = [2 * rank**2 for rank in range(SIZE)]
    assert_allclose(model.get_weights()[0], [[1 - 0.5 * 2 * sum(slopes) / SIZE]], rtol=1e-6)


def test_local_variables_are_not_averaged_and_may_differ_in_shape(in_graph: bool) -> None:
    shared, local = tf.Variable([1.0]), tf.Variable(tf.fill([RANK + 1], float(RANK)))
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(1.0, momentum=0.5))
    optimizer.register_local_var(local)
    steps(optimizer, [local, shared], [tf.ones(RANK + 1), tf.ones(1)], 1, in_graph)
    assert_allclose(shared, [1 - MEAN])
    assert_allclose(local, np.full(RANK + 1, RANK - (RANK + 1) / SIZE), rtol=1e-6)
    with pytest.raises(lt.ConfigurationError, match="before the first step"):
        optimizer.register_local_var(shared)


@pytest.mark.parametrize("compression", [lt.Compression.none, lt.Compression.fp16])
@pytest.mark.parametrize(("op", "factor"), [(lt.Average, 2.0), (lt.Sum, 1.0)])
def test_ops_compression_and_factors(op: Any, factor: float, compression: Any, in_graph: bool) -> None:
    weight = tf.Variable([1.0, 2.0])
    optimizer = lt.DistributedOptimizer(
        keras.optimizers.SGD(1.0), op=op, compression=compression, gradient_predivide_factor=factor, groups=2
    )
    steps(optimizer, [weight], [tf.constant([1.0, 3.0])], 1, in_graph)
    total = MEAN * (SIZE if op is lt.Sum else 1)
    assert_array_equal(weight, [1 - total, 2 - 3 * total])


def test_optimizers_of_two_process_sets() -> None:
    if SIZE == 1:
        return
    others = lt.add_process_set(range(SIZE - 1))
    for wrap in (
        lt.DistributedOptimizer,
        lambda sgd, **options: lt.SlowMo(sgd, period=1, slow_momentum=0.0, **options),
    ):
        weight = tf.Variable([float(RANK)])
        optimizer = wrap(keras.optimizers.SGD(1.0), process_set=others)
        steps(optimizer, [weight], [tf.ones([1])], 1, in_graph=False)
        last = SIZE - 1
        assert_allclose(weight, [-sum(range(1, SIZE)) / last if others.included() else last - (last + 1)])
    lt.remove_process_set(others)


def test_arguments_that_cannot_work() -> None:
    for options, words in (
        ({"backward_passes_per_step": 0}, "backward_passes_per_step"),
        ({"op": lt.Sum, "gradient_predivide_factor": 2.0}, "predivide_factor"),
        ({"compression": lt.Compression}, "compression must be"),
        ({"op": lt.Sum, "base": lt.LocalSGD(), "period": 2}, "say how gradients are averaged"),
        ({"groups": [[3]]}, "groups"),
    ):
        with pytest.raises(lt.ConfigurationError, match=words):
            lt.DistributedOptimizer("sgd", **options)
