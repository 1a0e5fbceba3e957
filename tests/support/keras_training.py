"""What tests of Keras share: a vector that is trained by given gradients, eagerly and in a graph, and a small model."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable, Iterator
from typing import Any
from weakref import WeakKeyDictionary

import keras
import numpy as np
import tensorflow as tf

Gradient = Callable[[int, int, Any], Any]


class Vector:
    """A float64 variable that is stepped by gradients from NumPy.

    Args:
        start: first value.
        optimizer: makes the distributed optimizer.
        graph: step in a ``tf.function``.
    """

    def __init__(self, start: Any, optimizer: Any, graph: bool) -> None:
        self.variable = keras.Variable(start, dtype="float64", name="vector")
        self.optimizer = optimizer
        self._step = self._apply
        if graph:
            specification = tf.TensorSpec(start.shape, tf.float64)
            self._step = tf.function(self._apply, input_signature=[specification, tf.TensorSpec([], tf.float64)])

    def _apply(self, gradient: Any, loss: Any) -> None:
        self.optimizer.apply([gradient], [self.variable], loss=loss)

    @property
    def value(self) -> Any:
        return self.variable.numpy()

    def step(self, gradient: Any, loss: float = 0.0) -> None:
        self._step(tf.constant(gradient), tf.constant(loss, tf.float64))

    def train(self, gradient: Gradient, rank: int, steps: int, first: int = 0) -> Any:
        for step in range(first, first + steps):
            self.step(gradient(rank, step, self.value))
        return self.value


def make_model(seed: int = 0, dtype: str = "float32") -> keras.Model:
    """Convolution, BatchNorm, frozen and trained dense layers, dropout with a seed generator."""
    keras.utils.set_random_seed(seed)
    frozen = keras.layers.Dense(4, dtype=dtype, trainable=False, name="frozen")
    return keras.Sequential(
        [
            keras.layers.Input((5, 5, 1), dtype=dtype),
            keras.layers.Conv2D(4, 3, padding="same", use_bias=False, dtype=dtype, name="conv"),
            keras.layers.BatchNormalization(dtype=dtype, name="norm", momentum=0.9),
            keras.layers.ReLU(dtype=dtype),
            keras.layers.GlobalAveragePooling2D(dtype=dtype),
            frozen,
            keras.layers.Dropout(0.1, seed=3, dtype=dtype),
            keras.layers.Dense(2, dtype=dtype, name="out"),
        ]
    )


def batches(rank: int, steps: int, first: int = 0, dtype: str = "float32") -> Iterator[tuple[Any, Any]]:
    for step in range(first, first + steps):
        generator = np.random.default_rng([rank, step])
        yield generator.normal(size=(6, 5, 5, 1)).astype(dtype), generator.integers(0, 2, 6)


GRAPHS: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()

cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)


def train_step(model: keras.Model, optimizer: Any) -> Callable[[Any, Any], Any]:
    """One step, as loops of TensorFlow users have it."""

    def step(images: Any, labels: Any) -> Any:
        with tf.GradientTape() as tape:
            loss = cross_entropy(labels, model(images, training=True))
        gradients = tape.gradient(loss, model.trainable_variables)
        optimizer.apply_gradients(zip(gradients, model.trainable_variables, strict=True), loss=loss)
        return loss

    return step


def train(model: keras.Model, optimizer: Any, rank: int, steps: int, first: int = 0, way: str = "eager") -> None:
    """Take steps "eager", in a "graph", or by "fit"."""
    if way == "fit":
        data = list(batches(rank, steps, first))
        images, labels = (np.concatenate(column) for column in zip(*data, strict=True))
        if not model.compiled or model.optimizer is not optimizer:
            model.compile(optimizer=optimizer, loss=cross_entropy)
        model.fit(images, labels, batch_size=6, epochs=1, shuffle=False, verbose=0)
        return
    step = train_step(model, optimizer)
    if way == "graph":
        step = GRAPHS.setdefault(optimizer, tf.function(step))
    for images, labels in batches(rank, steps, first):
        step(tf.constant(images), tf.constant(labels))
