"""What torch and Keras models say about themselves, and the mappings that are made of it."""

import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))

import digits_torch
import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from keras import layers
from numpy.testing import assert_allclose
from torch import nn

import lentando.tensorflow as ltf
import lentando.torch as lt
from lentando.tensorflow.names import names_of


def carry_over(first: nn.Module, second: Any) -> lt.WeightMap:
    """Give the Keras model the torch model's values; checks that every one of either is mapped, and the way back."""
    mapping = lt.WeightMap.between(lt.layers(first), ltf.layers(second))
    assert lt.WeightMap.between(ltf.layers(second), lt.layers(first)) == mapping.inverse
    sources = {name: tensor.numpy() for name, tensor in first.state_dict().items() if tensor.is_floating_point()}
    frozen = [variable for variable in second.weights if not variable.trainable]
    variables = [*second.trainable_variables, *frozen]
    targets = dict(zip(names_of(variables, second), variables, strict=True))
    mapping.check({n: a.shape for n, a in sources.items()}, {n: tuple(v.shape) for n, v in targets.items()})
    for name, rule in mapping.rules.items():
        targets[name].assign(rule.apply(sources[rule.source]))
        assert np.array_equal(rule.inverse.apply(targets[name].numpy()), sources[rule.source])
    return mapping


def assert_same_outputs(first: nn.Module, second: Any, images: Any) -> None:
    first.eval()
    with torch.no_grad():
        expected = first(torch.from_numpy(images)).numpy()
    found = second(np.moveaxis(images, 1, -1), training=False).numpy()
    assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


def norm() -> Any:
    return layers.BatchNormalization(epsilon=1e-5)


def stir(model: nn.Module) -> nn.Module:
    """BatchNorm that does something."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 2)
    return model


def digits_twin() -> Any:
    return keras.Sequential(
        [
            keras.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            norm(),
            layers.ReLU(),
            layers.MaxPooling2D(),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            norm(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


def test_digits_model_and_its_keras_twin_compute_the_same() -> None:
    first, second = stir(digits_torch.make_model(0)), digits_twin()
    mapping = carry_over(first, second)
    assert mapping.rules["sequential/dense/kernel"] == lt.WeightRule(
        "8.weight", "sequential/dense/kernel", (2, 3, 1, 0), ((10,), (32, 4, 4)), (3, 1)
    )
    images = np.random.default_rng(0).normal(size=(5, 1, 8, 8)).astype(np.float32)
    assert_same_outputs(first, second, images)


def maps_torch() -> nn.Module:
    return stir(
        nn.Sequential(
            nn.Conv2d(2, 3, (3, 2)), nn.ReLU(), nn.Dropout(), nn.Flatten(), nn.BatchNorm1d(3 * 4 * 4), nn.ReLU(),
            nn.Linear(48, 6), nn.Linear(6, 2),
        )
    )  # fmt: skip


def functional(*, permuted: bool) -> Any:
    """Flattened channels last, or, with the channels moved first as in torch, channels first."""
    inputs = keras.Input((6, 5, 2))
    x = layers.Conv2D(3, (3, 2))(inputs)
    x = layers.Dropout(0.5)(layers.Activation("relu")(x))
    if permuted:
        x = layers.Permute((3, 1, 2))(x)
    x = layers.ReLU()(norm()(layers.Flatten()(x)))
    return keras.Model(inputs, layers.Dense(2)(layers.Dense(6)(x)))


@pytest.mark.parametrize("permuted", [False, True])
def test_flattened_maps_are_followed_through_layers_that_keep_their_order(permuted: bool) -> None:
    first, second = maps_torch(), functional(permuted=permuted)
    mapping = carry_over(first, second)
    (kernel,) = (rule for rule in mapping.rules.values() if rule.source == "6.weight")
    assert (kernel.split is None) == permuted
    images = np.random.default_rng(0).normal(size=(3, 2, 6, 5)).astype(np.float32)
    assert_same_outputs(first, second, images)


def test_images_flattened_at_once() -> None:
    first = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 5, 2))
    second = keras.Sequential([keras.Input((4, 5, 3)), layers.Flatten(), layers.Dense(2)])
    carry_over(first, second)
    assert_same_outputs(first, second, np.random.default_rng(0).normal(size=(3, 3, 4, 5)).astype(np.float32))


def test_embedding_and_tied_layers() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(7, 3)
            self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)
            self.second.weight = self.first.weight
            self.second.bias = self.first.bias

        def forward(self, words: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.second(self.first(self.words(words)))
            return result

    shared = layers.Dense(3)
    inputs = keras.Input((4,), dtype="int32")
    second = keras.Model(inputs, shared(shared(layers.Embedding(7, 3)(inputs))))
    first = Tied()
    described = lt.layers(first)
    mapping = lt.WeightMap.between(described[:2], ltf.layers(second))  # Keras lists a shared layer once
    assert {rule.source for rule in mapping.rules.values()} == {"words.weight", "first.weight", "first.bias"}
    assert described[2].tensors["weight"].name == "first.weight"


class Reshaped(keras.Model):
    """Flattens out of sight."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = layers.Conv2D(3, 3)
        self.dense = layers.Dense(2)

    def call(self, images: Any) -> Any:
        return self.dense(tf.reshape(self.conv(images), (-1, 3 * 4 * 4)))


def test_flattening_that_cannot_be_seen_is_refused() -> None:
    model = Reshaped()
    model(np.zeros((1, 6, 6, 1), np.float32))
    first = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Flatten(), nn.Linear(48, 2))
    with pytest.raises(ltf.ConfigurationError, match=r"order of the input features of dense 'dense.*' is not known"):
        lt.WeightMap.between(lt.layers(first), ltf.layers(model))


@pytest.mark.parametrize(
    ("first", "layer", "stated"),
    [
        (nn.Linear(4, 3), layers.Dense(2), r"shape \(3, 4\) \(axes oi\), but '.*dense/kernel' has \(4, 2\)"),
        (nn.Linear(4, 3), layers.Dense(3, use_bias=False), "has weight, bias, but 'dense.*' has weight"),
        (nn.Bilinear(4, 4, 3), layers.GRUCell(3), "Bilinear 'Bilinear' but RNN 'rnn"),
        (nn.LayerNorm(4), layers.BatchNormalization(), "layer norm 'LayerNorm' but batch norm 'batch_norm"),
    ],
)
def test_models_that_differ_are_refused(first: nn.Module, layer: Any, stated: str) -> None:
    if isinstance(layer, layers.GRUCell):
        layer = layers.RNN(layer)
    model = keras.Sequential([keras.Input((5, 4) if isinstance(layer, layers.RNN) else (4,)), layer])
    with pytest.raises(ltf.ConfigurationError, match=stated):
        lt.WeightMap.between(lt.layers(first), ltf.layers(model))
