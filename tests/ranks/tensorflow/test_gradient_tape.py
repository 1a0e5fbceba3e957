"""Options of ``DistributedGradientTape``: sparse gradients, compression, factors, local sources, process sets."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose, assert_array_equal

import lentando.tensorflow as lt

SIZE, RANK = lt.size(), lt.rank()
MEAN = (SIZE + 1) / 2


def recorded(embedding: Any, weight: Any) -> Any:
    """A tape, and a loss whose gradients are rank + 1 for the weight, and 1 in rows 0 and rank of the embedding."""
    with tf.GradientTape(persistent=True) as tape:
        loss = tf.reduce_sum(tf.gather(embedding, [0, RANK])) + weight * (RANK + 1)
    return tape, loss


@pytest.fixture(params=[False, True])
def in_graph(request: pytest.FixtureRequest) -> Any:
    return request.param


def of_tape(in_graph: bool, sources: Any, **options: Any) -> Any:
    def gradient() -> Any:
        tape, loss = recorded(*sources)
        return lt.DistributedGradientTape(tape, **options).gradient(loss, list(sources))

    return (tf.function(gradient) if in_graph else gradient)()


def variables() -> Any:
    return tf.Variable(tf.zeros([SIZE, 1])), tf.Variable(1.0)


@pytest.mark.parametrize("is_dense", [False, True])
@pytest.mark.parametrize(("op", "divisor"), [(lt.Average, SIZE), (lt.Sum, 1)])
def test_rows_are_gathered_or_reduced_densely(op: Any, divisor: int, is_dense: bool, in_graph: bool) -> None:
    rows, weight = of_tape(in_graph, variables(), op=op, sparse_as_dense=is_dense)
    assert isinstance(rows, tf.IndexedSlices) != is_dense
    expected = np.ones((SIZE, 1))
    expected[0] += SIZE
    assert_allclose(tf.convert_to_tensor(rows), expected / divisor, rtol=1e-6)
    assert weight == SIZE * MEAN / divisor


def test_compression_and_predivide_factor(in_graph: bool) -> None:
    options = {"compression": lt.Compression.fp16, "gradient_predivide_factor": 2.0, "sparse_as_dense": True}
    _, weight = of_tape(in_graph, variables(), **options)
    assert weight.dtype == tf.float32
    assert weight == MEAN


def test_local_sources_keep_their_gradients_divided_by_the_number_of_ranks(in_graph: bool) -> None:
    for are_scaled in (True, False):
        embedding, weight = variables()

        def gradient(are_scaled: bool = are_scaled, sources: Any = (embedding, weight)) -> Any:
            tape, loss = recorded(*sources)
            distributed = lt.DistributedGradientTape(tape, scale_local_gradients=are_scaled)
            for source in sources:
                distributed.register_local_source(source)
            return distributed.gradient(loss, list(sources))

        rows, own = (tf.function(gradient) if in_graph else gradient)()
        assert_allclose(own, (RANK + 1) / (SIZE if are_scaled else 1))
        assert_allclose(rows.values, np.full((2, 1), 1 / (SIZE if are_scaled else 1)), rtol=1e-6)
        assert_array_equal(rows.indices, [0, RANK])


def test_layers_can_be_local() -> None:
    local, shared = keras.layers.Dense(1, use_bias=False), keras.layers.Dense(1, use_bias=False)
    model = keras.Sequential([keras.Input([1]), local, shared])
    for layer in (local, shared):
        layer.kernel.assign([[1.0]])
    with tf.GradientTape() as tape:
        loss = tf.reduce_sum(model(tf.constant([[RANK + 1.0]])))
    distributed = lt.PartialDistributedGradientTape(tape, local_layers=[local])
    of_local, of_shared = distributed.get_local_and_global_gradients(loss, model.trainable_variables)
    assert [source is local.kernel for source, _ in of_local] == [True]
    assert_allclose(of_local[0][1], [[(RANK + 1) / SIZE]])
    assert_allclose(of_shared[0][1], [[MEAN]])
    with pytest.raises(lt.ConfigurationError, match="must be Keras layers, got int"):
        lt.PartialDistributedGradientTape(tape, local_layers=[3])
    with pytest.raises(lt.ConfigurationError, match="layer 'later' of local_layers has not been built"):
        lt.PartialDistributedGradientTape(tape, local_layers=[local, keras.layers.Dense(1, name="later")])


def test_ranks_outside_of_the_process_set_keep_their_own_gradients() -> None:
    if SIZE == 1:
        return
    first = lt.add_process_set([0])
    _, weight = of_tape(False, variables(), process_set=first)
    assert weight == RANK + 1
    lt.remove_process_set(first)


def test_arguments_that_exclude_each_other() -> None:
    for options, words in (
        ({"gradient_predivide_factor": 2.0, "op": lt.Sum}, "gradient_predivide_factor"),
        ({"groups": -1}, "groups"),
        ({"op": "sum"}, "op must be"),
        ({"op": lt.Min}, "op must be one of Average, Sum, Adasum, got Min"),
        ({"op": lt.Product}, "op must be one of Average, Sum, Adasum, got Product"),
    ):
        with pytest.raises(lt.ConfigurationError, match=words):
            lt.DistributedGradientTape(tf.GradientTape(), **options)
