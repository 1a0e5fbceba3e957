"""Train a row of the papers' tables on CIFAR-10, CIFAR-100, ImageNet or Fashion-MNIST, in Keras.

The rows, the data and the flags are described in README.md:

    python examples/cifar/train_keras.py --list
    mpirun -np 32 python examples/cifar/train_keras.py --row sgp-slowmo --data ~/data --output runs/sgp
    mpirun -np 32 python examples/cifar/train_keras.py ... --resume    # after a crash, from the last checkpoint
    lentando report runs/sgp    # figures, as one HTML page
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import models_keras as models
import tensorflow as tf
from command_line import arguments
from loader import Batch
from training import load_data, train

import lentando.tensorflow as lt

sys.path.append(str(Path(__file__).parents[1]))
import recipe_keras


class KerasLearner:
    """A network, SGD with Nesterov momentum, and the method of the row around it."""

    def __init__(self, options: argparse.Namespace, channels: int, classes: int) -> None:
        recipe = options.recipe
        self._model = models.build(recipe.model, channels, classes, options.seed, recipe.pixels)
        self._weight_decay = recipe.weight_decay
        sgd = keras.optimizers.SGD(recipe.lr, recipe.momentum, nesterov=recipe.momentum > 0)
        self.optimizer = recipe.optimizer(lt, sgd, self._model, options.reduction)
        self.optimizer.build(self._model.trainable_variables)
        # Batches of an epoch differ in size by 1: one graph takes all of them.
        signature = [tf.TensorSpec((None, recipe.pixels, recipe.pixels, channels)), tf.TensorSpec((None,), tf.int64)]
        self._train = tf.function(self._train_on, input_signature=signature)
        self._count = tf.function(self._evaluate, input_signature=signature)

    def step(self, batch: Batch, learning_rate: float) -> tf.Tensor:
        self.optimizer.learning_rate = learning_rate
        return self._train(*_channels_last(batch))

    def _train_on(self, images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            scores = self._model(images, training=True)
            loss = tf.reduce_mean(keras.losses.sparse_categorical_crossentropy(labels, scores, from_logits=True))
        gradients = tape.gradient(loss, variables)
        # Keras's own weight_decay is decoupled from the gradient. The papers' is part of it.
        decayed = [
            gradient + self._weight_decay * variable for gradient, variable in zip(gradients, variables, strict=True)
        ]
        self.optimizer.apply(decayed, variables, loss=loss)
        return loss

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        loss, correct = self._count(*_channels_last(batch))
        return float(loss), int(correct)

    def _evaluate(self, images: tf.Tensor, labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        scores = self._model(images, training=False)
        losses = keras.losses.sparse_categorical_crossentropy(labels, scores, from_logits=True)
        return tf.reduce_sum(losses), tf.reduce_sum(tf.cast(tf.argmax(scores, 1) == labels, tf.int64))

    def weights(self) -> list[Any]:
        return [variable.numpy() for variable in self._model.weights]


def _channels_last(batch: Batch) -> tuple[tf.Tensor, tf.Tensor]:
    images, labels = batch
    return tf.constant(images.transpose(0, 2, 3, 1)), tf.constant(labels)


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Train on the rank that calls it. Returns the results."""
    lt.init()
    recipe_keras.take_gpu(options)
    data = load_data(lt, options)
    return train(lt, KerasLearner(options, data.channels, data.classes), data, options)


if __name__ == "__main__":
    assert __doc__ is not None
    recipe_keras.start(main, arguments(__doc__))
