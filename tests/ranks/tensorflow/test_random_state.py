"""What dropout draws after a resume: checkpoints hold the states of the seed generators of a model's layers."""

from pathlib import Path
from typing import Any

import keras
import keras_training
import numpy as np
import pytest

import lentando.tensorflow as lt


class Noisy(keras.layers.Layer):  # type: ignore[misc]
    """Draws from a generator that it keeps in a list, and holds a layer that draws from its own."""

    def __init__(self) -> None:
        super().__init__()
        self.generators = [keras.random.SeedGenerator(5)]
        self.inner = keras.Sequential([keras.layers.GaussianNoise(0.1), keras.layers.Dropout(0.25)])

    def call(self, x: Any, training: bool = False) -> Any:
        noise = keras.random.normal(keras.ops.shape(x), seed=self.generators[0]) if training else 0
        return self.inner(x + noise, training=training)


LAYERS = {"dropout": lambda: keras.layers.Dropout(0.5), "noise in a layer of layers": Noisy}


def make(name: str, seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    layers = [keras.layers.Flatten(), LAYERS[name](), keras.layers.Dense(2)]
    model = keras.Sequential([keras.Input((5, 5, 1)), *layers])
    return model, lt.SlowMo(keras.optimizers.SGD(0.1), model=model, period=2)


@pytest.mark.parametrize(("name", "way"), [("dropout", "fit"), ("noise in a layer of layers", "graph")])
def test_resumed_training_with_random_layers_is_bit_identical(name: str, way: str, shared_path: Path) -> None:
    model, optimizer = make(name, lt.rank())  # each rank drops other units
    keras_training.train(model, optimizer, lt.rank(), 3, way=way)
    lt.save(shared_path, optimizer)
    keras_training.train(model, optimizer, lt.rank(), 3, first=3, way=way)

    resumed, again = make(name, 100)
    lt.load(shared_path, again)
    keras_training.train(resumed, again, lt.rank(), 3, first=3, way=way)
    for own, other in zip(model.get_weights(), resumed.get_weights(), strict=True):
        np.testing.assert_array_equal(own, other)


def test_generators_of_ranks_stay_apart(shared_path: Path) -> None:
    """Each rank continues with the state that it saved itself, in a process that has made other generators before."""
    model, optimizer = make("dropout", lt.rank())
    lt.save(shared_path, optimizer)
    expected = model(np.ones((4, 5, 5, 1), np.float32), training=True)
    keras.layers.Dropout(0.5)
    other, again = make("dropout", 7)
    lt.load(shared_path, again)
    drawn = other(np.ones((4, 5, 5, 1), np.float32), training=True).numpy()
    np.testing.assert_array_equal(drawn, expected.numpy())
    if lt.size() > 1:
        assert len({str(row) for row in lt.allgather_object(drawn.tolist())}) > 1
