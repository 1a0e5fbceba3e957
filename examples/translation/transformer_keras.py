"""A Transformer as Vaswani et al. describe it, in Keras: that of ``train_torch.py`` but for its attention's biases."""

from collections.abc import Iterator
from itertools import count

import keras
import numpy as np
import tensorflow as tf
from keras import layers
from parallel_text import PAD
from translation_recipes import Shape


class Attention(layers.Layer):
    """Attention to the same or another sequence, added to what was there, and normalized."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self._dropout = dropout
        self._heads = layers.MultiHeadAttention(shape.heads, shape.width // shape.heads)
        self._normalize = layers.LayerNormalization(epsilon=1e-5)

    def call(
        self, texts: tf.Tensor, memory: tf.Tensor, seed: tf.Tensor | None = None, mask: tf.Tensor | None = None
    ) -> tf.Tensor:
        found = self._heads(texts, memory, attention_mask=mask, use_causal_mask=mask is None)
        return self._normalize(texts + dropped(found, self._dropout, seed))


class FeedForward(layers.Layer):
    """Two dense layers, added to what was there, and normalized."""

    def __init__(self, shape: Shape, dropout: float) -> None:
        super().__init__()
        self._dropout = dropout
        self._inside = layers.Dense(shape.feed_forward, activation="relu")
        self._outside = layers.Dense(shape.width)
        self._normalize = layers.LayerNormalization(epsilon=1e-5)

    def call(self, texts: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
        return self._normalize(texts + dropped(self._outside(self._inside(texts)), self._dropout, seed))


class Transformer(keras.Model):
    """Encoder and decoder, with embeddings shared by both languages and the last layer.

    Args:
        shape: its size.
        vocabulary: number of sub-words.
        longest: sub-words of the longest sentence.
        dropout: share of activations that are dropped in training.
    """

    def __init__(self, shape: Shape, vocabulary: int, longest: int, dropout: float) -> None:
        super().__init__()
        self._width, self._dropout = shape.width, dropout
        initial = keras.initializers.RandomNormal(stddev=shape.width**-0.5)
        self._embeddings = layers.Embedding(vocabulary, shape.width, embeddings_initializer=initial)
        rates = 1 / 10_000 ** (np.arange(0, shape.width, 2) / shape.width)
        angles = np.arange(longest)[:, None] * rates
        self._positions = tf.constant(np.concatenate([np.sin(angles), np.cos(angles)], axis=1), tf.float32)
        self._encoder = [(Attention(shape, dropout), FeedForward(shape, dropout)) for _ in range(shape.layers)]
        self._decoder = [
            (Attention(shape, dropout), Attention(shape, dropout), FeedForward(shape, dropout))
            for _ in range(shape.layers)
        ]

    def call(self, source: tf.Tensor, before: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
        """Scores of all sub-words at each place of the translations.

        Args:
            source: sentences, of shape (pairs, length).
            before: the sub-words before each place of their translations, of shape (pairs, length).
            seed: seed of dropout, without which nothing is dropped.
        """
        return self.decode(before, self.encode(source, seed), source, seed)

    def encode(self, source: tf.Tensor, seed: tf.Tensor | None = None) -> tf.Tensor:
        seeds = _seeds(seed, 0)
        texts = dropped(self._embedded(source), self._dropout, next(seeds))
        there = (source != PAD)[:, None]
        for attention, feed_forward in self._encoder:
            texts = attention(texts, texts, next(seeds), there)
            texts = feed_forward(texts, next(seeds))
        return texts

    def decode(
        self, before: tf.Tensor, memory: tf.Tensor, source: tf.Tensor, seed: tf.Tensor | None = None
    ) -> tf.Tensor:
        seeds = _seeds(seed, 1)
        texts = dropped(self._embedded(before), self._dropout, next(seeds))
        there = (source != PAD)[:, None]
        for itself, attention, feed_forward in self._decoder:
            texts = itself(texts, texts, next(seeds))
            texts = attention(texts, memory, next(seeds), there)
            texts = feed_forward(texts, next(seeds))
        return tf.matmul(texts, self._embeddings.embeddings, transpose_b=True)

    def _embedded(self, texts: tf.Tensor) -> tf.Tensor:
        return self._embeddings(texts) * self._width**0.5 + self._positions[: tf.shape(texts)[1]]


def _seeds(seed: tf.Tensor | None, side: int) -> Iterator[tf.Tensor | None]:
    """A seed for each place where values are dropped, or None where none are."""
    for place in count():
        yield None if seed is None else tf.stack([seed, 2 * place + side])


def dropped(texts: tf.Tensor, share: float, seed: tf.Tensor | None) -> tf.Tensor:
    """With a share of the values set to zero, and the others enlarged. The seed alone decides which."""
    return texts if seed is None else tf.nn.experimental.stateless_dropout(texts, share, seed)
