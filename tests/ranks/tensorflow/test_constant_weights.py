"""Keras weights that are constant and not finite are no divergence."""

from typing import Any

import keras
import numpy as np
import pytest

import lentando.tensorflow as lt


@keras.saving.register_keras_serializable()
class Masked(keras.layers.Layer):
    """Adds a causal mask, and counts in a weight that is averaged."""

    def build(self, shape: Any) -> None:
        length = shape[-1]
        values = np.triu(np.full((length, length), -np.inf, np.float32), 1)
        self.mask = self.add_weight(name="mask", shape=(length, length), trainable=False)
        self.mask.assign(values)
        self.seen = self.add_weight(name="seen", shape=(), initializer="zeros", trainable=False)

    def call(self, x: Any) -> Any:
        self.seen.assign_add(1.0)
        return keras.ops.softmax(x[:, None, :] + self.mask, axis=-1)[:, -1, :]


@pytest.mark.parametrize("base", [lt.LocalSGD(), lt.SGP()], ids=["local", "sgp"])
def test_a_mask_of_minus_infinity_trains_and_stays(base: Any) -> None:
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(5), Masked(), keras.layers.Dense(2)])
    mask = model.layers[1].mask
    optimizer = lt.DistributedOptimizer(keras.optimizers.SGD(0.1), model=model, base=base, period=2)
    model.compile(optimizer=optimizer, loss="mse")
    x = np.random.default_rng(lt.rank()).normal(size=(16, 4))
    model.fit(x, x[:, :2], batch_size=4, verbose=0)
    assert np.isneginf(mask.numpy()).sum() == 10
    assert float(model.layers[1].seen.numpy()) == 4.0
    model.layers[1].seen.assign(np.nan if lt.rank() == 0 else 0.0)
    with pytest.raises(Exception, match="seen' is not finite"):
        model.fit(x, x[:, :2], batch_size=4, verbose=0)
