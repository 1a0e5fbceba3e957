"""``SyncBatchNormalization``: the ranks together are one process with the whole batch."""

from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from numpy.testing import assert_allclose

import lentando.tensorflow as lt

SIZE, RANK = lt.size(), lt.rank()
COUNTS = [2 + rank for rank in range(SIZE)]
START = sum(COUNTS[:RANK])
OWN = slice(START, START + COUNTS[RANK])


def gradients(layer: Any, inputs: Any, weights: Any, mask: Any = None) -> Any:
    with tf.GradientTape() as tape:
        tape.watch(inputs)
        outputs = layer(inputs, training=True, mask=mask)
        loss = tf.reduce_sum(outputs * weights)
    return outputs, *tape.gradient(loss, [inputs, layer.gamma.value, layer.beta.value])


@pytest.mark.parametrize("in_graph", [False, True])
@pytest.mark.parametrize("axis", [-1, 1])
@pytest.mark.parametrize("is_masked", [False, True])
def test_equals_one_process_with_the_whole_batch(axis: int, is_masked: bool, in_graph: bool) -> None:
    if is_masked and axis != -1:
        return  # Keras's masks have the shape of the inputs without their last axis
    random = np.random.default_rng(1)
    # Keras divides masked sums by their count + 1e-7.
    offset, tolerance = (0, 1e-6) if is_masked else (1000, 1e-8)
    whole = offset + random.normal(size=(sum(COUNTS), 3, 4))
    weights = random.normal(size=whole.shape)
    mask = random.integers(0, 2, whole.shape[:2]).astype(bool) if is_masked else None
    options = {"axis": axis, "dtype": "float64", "momentum": 0.5}
    one, all_ranks = keras.layers.BatchNormalization(**options), lt.SyncBatchNormalization(**options)
    one.build(whole.shape)
    all_ranks.build(whole.shape)
    expected = gradients(one, tf.constant(whole), tf.constant(weights), None if mask is None else tf.constant(mask))
    call = tf.function(gradients) if in_graph else gradients
    own_mask = None if mask is None else tf.constant(mask[OWN])
    found = call(all_ranks, tf.constant(whole[OWN]), tf.constant(weights[OWN]), own_mask)
    assert_allclose(found[0], expected[0][OWN], atol=tolerance)
    assert_allclose(found[1], expected[1][OWN], atol=tolerance)
    for own, of_all in zip(found[2:], expected[2:], strict=True):
        assert_allclose(lt.allreduce(own, op=lt.Sum), of_all, atol=tolerance)
    assert_allclose(all_ranks.moving_mean, one.moving_mean, atol=tolerance)
    assert_allclose(all_ranks.moving_variance, one.moving_variance, atol=tolerance)
    assert_allclose(all_ranks(whole), one(whole), rtol=1e-5)


def test_half_precision_and_configuration() -> None:
    layer = lt.SyncBatchNormalization(fused=False, dtype="mixed_float16", name="bn")
    outputs = layer(tf.fill([2, 1], 200.0 * (RANK + 1)), training=True)
    assert outputs.dtype == tf.float16
    assert np.isfinite(layer.moving_variance).all()
    assert keras.layers.deserialize(keras.layers.serialize(layer)).name == "bn"
    for setting in ("fused", "renorm", "synchronized"):
        with pytest.raises(lt.ConfigurationError, match=setting):
            lt.SyncBatchNormalization(**{setting: True})


def test_a_frozen_layer_and_inference_do_not_communicate() -> None:
    layer = lt.SyncBatchNormalization()
    layer.build([None, 1])
    if RANK == 0:  # no other rank calls it
        layer(tf.ones([1, 1]), training=False)
        layer.trainable = False
        layer(tf.ones([1, 1]), training=True)
    lt.barrier()
