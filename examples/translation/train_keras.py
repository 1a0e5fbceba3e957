"""Train a row of SlowMo's WMT'16 table on parallel text, in Keras.

The rows, the data and the flags are described in README.md. Translations are greedy.

    python examples/translation/train_keras.py --list
    mpirun -np 8 python examples/translation/train_keras.py --row sgp-slowmo --data ~/wmt16 --output runs/sgp
    mpirun -np 8 python examples/translation/train_keras.py ... --resume    # after a crash, from the last checkpoint
    lentando report runs/sgp    # figures, as one HTML page
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from numpy.typing import NDArray
from parallel_text import EOS, PAD
from token_batches import Batch
from transformer_keras import Transformer
from translation_flags import arguments
from translation_recipes import SHAPES
from translation_training import TranslationCourse

import lentando.tensorflow as lt

sys.path.append(str(Path(__file__).parents[1]))
import recipe_keras
import recipe_loop

TEXTS = tf.TensorSpec((None, None), tf.int64)


class KerasTranslator:
    """A Transformer, Adam, and the method of the row around it."""

    def __init__(self, options: argparse.Namespace, vocabulary: int, longest: int) -> None:
        recipe = options.recipe
        keras.utils.set_random_seed(options.seed)
        self._smoothing, self._longest = recipe.label_smoothing, longest
        self._model = Transformer(SHAPES[recipe.model], vocabulary, 2 * longest, recipe.dropout)
        self._model(tf.constant([[EOS]]), tf.constant([[PAD]]))  # makes the variables
        adam = keras.optimizers.Adam(recipe.lr, beta_1=0.9, beta_2=0.98, epsilon=1e-8)
        self.optimizer = recipe.optimizer(lt, adam, self._model, options.reduction)
        self.optimizer.build(self._model.trainable_variables)
        # Batches differ in their shape: one graph takes all of them.
        self._train = tf.function(self._train_on, input_signature=[TEXTS, TEXTS, tf.TensorSpec((), tf.int32)])
        self._count = tf.function(self._evaluate, input_signature=[TEXTS, TEXTS])
        memory = tf.TensorSpec((None, None, SHAPES[recipe.model].width), tf.float32)
        self._decode = tf.function(self._model.decode, input_signature=[TEXTS, memory, TEXTS])

    def step(self, batch: Batch, learning_rate: float, seed: int) -> tf.Tensor:
        self.optimizer.learning_rate = learning_rate
        return self._train(*map(tf.constant, batch), tf.constant(seed % 2**31, tf.int32))

    def _train_on(self, source: tf.Tensor, target: tf.Tensor, seed: tf.Tensor) -> tf.Tensor:
        variables = self._model.trainable_variables
        with tf.GradientTape() as tape:
            losses, there = self._losses(source, target, self._smoothing, seed)
            loss = tf.reduce_sum(losses) / tf.reduce_sum(there)
        self.optimizer.apply(tape.gradient(loss, variables), variables, loss=loss)
        return loss

    def evaluate(self, batch: Batch) -> tuple[float, int]:
        loss, subwords = self._count(*map(tf.constant, batch))
        return float(loss), int(subwords)

    def _evaluate(self, source: tf.Tensor, target: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
        losses, there = self._losses(source, target, 0.0, None)
        return tf.reduce_sum(losses), tf.reduce_sum(there)

    def _losses(
        self, source: tf.Tensor, target: tf.Tensor, smoothing: float, seed: tf.Tensor | None
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Loss at each place of the translations, 0 behind their ends, and 1 where they are."""
        before = tf.pad(target[:, :-1], [[0, 0], [1, 0]], constant_values=PAD)  # what the decoder has seen
        logs = tf.nn.log_softmax(self._model(source, before, seed))
        losses = -(1 - smoothing) * tf.gather(logs, target, batch_dims=2) - smoothing * tf.reduce_mean(logs, axis=-1)
        there = tf.cast(target != PAD, tf.float32)
        return losses * there, there

    def translate(self, sources: NDArray[np.int64], beam: int) -> list[list[int]]:
        """The best next sub-word, until all sentences have ended."""
        source = tf.constant(sources)
        memory = self._model.encode(source)
        found = np.full((len(sources), 1), PAD)
        for _ in range(min(self._longest, 2 * sources.shape[1] + 10)):
            scores = self._decode(tf.constant(found), memory, source)[:, -1].numpy()
            has_ended = (found == EOS).any(axis=1)
            found = np.append(found, np.where(has_ended, PAD, scores.argmax(axis=1))[:, None], axis=1)
            if (found == EOS).any(axis=1).all():
                break
        return [[number for number in line if number not in (PAD, EOS)] for line in found.tolist()]

    def weights(self) -> list[Any]:
        return [variable.numpy() for variable in self._model.weights]


def main(options: argparse.Namespace) -> dict[str, Any]:
    """Train on the rank that calls it. Returns the results."""
    lt.init()
    recipe_keras.take_gpu(options)
    course = TranslationCourse(lt, options)
    course.begin(KerasTranslator(options, course.text.vocabulary.vocab_size(), course.text.longest()))
    return recipe_loop.train(lt, course, options)


if __name__ == "__main__":
    assert __doc__ is not None
    flags = arguments(__doc__, beam=1)
    if flags.beam != 1:
        raise SystemExit("in Keras, translations are greedy: pass --beam 1")
    recipe_keras.start(main, flags)
