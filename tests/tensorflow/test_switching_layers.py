"""Every kind of layer that crosses between PyTorch and Keras: equal outputs, both ways."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import torch
from keras import layers
from switching import assert_crosses
from torch import nn

import lentando.tensorflow as ltf
import lentando.torch as lt

GENERATOR = np.random.default_rng(0)


def array(*shape: int) -> Any:
    return GENERATOR.normal(size=shape).astype(np.float32)


def sequential(shape: tuple[int, ...], *own: Any) -> Any:
    return keras.Sequential([keras.Input(shape), *own])


class ChannelsFirst(nn.Module):
    """Lets a torch layer of sequences with channels first compute with features last."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x.transpose(1, 2)).transpose(1, 2)
        return result


class Output(nn.Module):
    """The output of a recurrent layer without its state."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(x)[0]
        return result


class Attention(nn.Module):
    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__()
        self.inner = nn.MultiheadAttention(*args, batch_first=True, **kwargs)

    def forward(self, query: torch.Tensor, value: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.inner(query, key, value)[0]
        return result


def attention(heads: int, size: int, shapes: list[tuple[int, int]], **settings: Any) -> Any:
    inputs = [keras.Input(shape) for shape in shapes]
    return keras.Model(inputs, layers.MultiHeadAttention(heads, size, output_shape=shapes[0][-1], **settings)(*inputs))


MAP, STEPS = (7, 6, 4), (5, 4)
ATTENDED = [(5, 8), (6, 8), (6, 8)]
OTHERS = [(5, 8), (6, 3), (6, 5)]

CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], Any], list[tuple[int, ...]]]] = {
    "dense": (lambda: nn.Linear(4, 3), lambda: sequential((4,), layers.Dense(3)), [(4,)]),
    "dense of each step": (
        lambda: nn.Linear(4, 3),
        lambda: sequential(STEPS, layers.TimeDistributed(layers.Dense(3))),
        [STEPS],
    ),
    "convolution 1d": (
        lambda: ChannelsFirst(nn.Conv1d(4, 3, 3)),
        lambda: sequential(STEPS, layers.Conv1D(3, 3)),
        [STEPS],
    ),
    "convolution 2d": (
        lambda: nn.Conv2d(4, 3, (3, 2), stride=2, bias=False),
        lambda: sequential(MAP, layers.Conv2D(3, (3, 2), strides=2, use_bias=False)),
        [MAP],
    ),
    "convolution 3d": (
        lambda: nn.Conv3d(2, 3, (2, 3, 1)),
        lambda: sequential((4, 5, 3, 2), layers.Conv3D(3, (2, 3, 1))),
        [(4, 5, 3, 2)],
    ),
    "grouped convolution": (
        lambda: nn.Conv2d(4, 6, 3, groups=2),
        lambda: sequential(MAP, layers.Conv2D(6, 3, groups=2)),
        [MAP],
    ),
    "depthwise convolution": (
        lambda: nn.Conv2d(4, 8, (3, 2), groups=4),
        lambda: sequential(MAP, layers.DepthwiseConv2D((3, 2), depth_multiplier=2)),
        [MAP],
    ),
    "depthwise convolution 1d": (
        lambda: ChannelsFirst(nn.Conv1d(4, 4, 2, groups=4, bias=False)),
        lambda: sequential(STEPS, layers.DepthwiseConv1D(2, use_bias=False)),
        [STEPS],
    ),
    "depthwise convolution of one channel": (
        lambda: nn.Conv2d(1, 3, 2),
        lambda: sequential((5, 5, 1), layers.DepthwiseConv2D(2, depth_multiplier=3)),
        [(5, 5, 1)],
    ),
    "convolution with as many groups as channels": (
        lambda: nn.Conv2d(4, 8, 3, groups=4),
        lambda: sequential(MAP, layers.Conv2D(8, 3, groups=4)),
        [MAP],
    ),
    "separable convolution": (
        lambda: nn.Sequential(nn.Conv2d(4, 8, 3, groups=4, bias=False), nn.Conv2d(8, 5, 1)),
        lambda: sequential(MAP, layers.SeparableConv2D(5, 3, depth_multiplier=2)),
        [MAP],
    ),
    "transposed convolution 1d": (
        lambda: ChannelsFirst(nn.ConvTranspose1d(4, 3, 3, stride=3)),
        lambda: sequential(STEPS, layers.Conv1DTranspose(3, 3, strides=3)),
        [STEPS],
    ),
    "transposed convolution 2d": (
        lambda: nn.ConvTranspose2d(4, 3, (3, 2), stride=2, bias=False),
        lambda: sequential(MAP, layers.Conv2DTranspose(3, (3, 2), strides=2, use_bias=False)),
        [MAP],
    ),
    "transposed convolution 3d": (
        lambda: nn.ConvTranspose3d(2, 3, (2, 3, 1)),
        lambda: sequential((4, 5, 3, 2), layers.Conv3DTranspose(3, (2, 3, 1))),
        [(4, 5, 3, 2)],
    ),
    "batch norm": (
        lambda: nn.BatchNorm2d(4),
        lambda: sequential(MAP, layers.BatchNormalization(epsilon=1e-5, momentum=0.9)),
        [MAP],
    ),
    "layer norm": (
        lambda: nn.LayerNorm(4),
        lambda: sequential(STEPS, layers.LayerNormalization(epsilon=1e-5)),
        [STEPS],
    ),
    "layer norm without bias": (
        lambda: nn.LayerNorm(4, bias=False),
        lambda: sequential(STEPS, layers.LayerNormalization(epsilon=1e-5, center=False)),
        [STEPS],
    ),
    "rms norm": (
        lambda: nn.RMSNorm(4, eps=1e-6),
        lambda: sequential(STEPS, layers.RMSNormalization()),
        [STEPS],
    ),
    "group norm": (
        lambda: nn.GroupNorm(2, 4),
        lambda: sequential(MAP, layers.GroupNormalization(2, epsilon=1e-5)),
        [MAP],
    ),
    "instance norm": (
        lambda: nn.InstanceNorm2d(4, affine=True),
        lambda: sequential(MAP, layers.GroupNormalization(-1, epsilon=1e-5)),
        [MAP],
    ),
    "prelu of maps": (lambda: nn.PReLU(4), lambda: sequential(MAP, layers.PReLU(shared_axes=[1, 2])), [MAP]),
    "prelu of features": (lambda: nn.PReLU(4), lambda: sequential((4,), layers.PReLU()), [(4,)]),
    "prelu of all": (lambda: nn.PReLU(1), lambda: sequential(MAP, layers.PReLU(shared_axes=[1, 2, 3])), [MAP]),
    "lstm": (
        lambda: Output(nn.LSTM(4, 3, batch_first=True)),
        lambda: sequential(STEPS, layers.LSTM(3, return_sequences=True)),
        [STEPS],
    ),
    "lstm without bias": (
        lambda: Output(nn.LSTM(4, 3, batch_first=True, bias=False)),
        lambda: sequential(STEPS, layers.LSTM(3, return_sequences=True, use_bias=False)),
        [STEPS],
    ),
    "two lstm of both directions": (
        lambda: Output(nn.LSTM(4, 3, 2, batch_first=True, bidirectional=True)),
        lambda: sequential(STEPS, *(layers.Bidirectional(layers.LSTM(3, return_sequences=True)) for _ in range(2))),
        [STEPS],
    ),
    "gru": (
        lambda: Output(nn.GRU(4, 3, batch_first=True)),
        lambda: sequential(STEPS, layers.GRU(3, return_sequences=True)),
        [STEPS],
    ),
    "gru without bias": (
        lambda: Output(nn.GRU(4, 3, batch_first=True, bias=False)),
        lambda: sequential(STEPS, layers.GRU(3, return_sequences=True, use_bias=False)),
        [STEPS],
    ),
    "simple rnn": (
        lambda: Output(nn.RNN(4, 3, batch_first=True)),
        lambda: sequential(STEPS, layers.SimpleRNN(3, return_sequences=True)),
        [STEPS],
    ),
    "attention": (lambda: Attention(8, 4), lambda: attention(4, 2, ATTENDED), ATTENDED),
    "attention without bias": (
        lambda: Attention(8, 2, bias=False),
        lambda: attention(2, 4, ATTENDED, use_bias=False),
        ATTENDED,
    ),
    "attention to other sizes": (
        lambda: Attention(8, 2, kdim=5, vdim=3),
        lambda: attention(2, 4, OTHERS),
        OTHERS,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_layer_crosses_both_ways(case: str) -> None:
    make_torch, make_keras, shapes = CASES[case]
    mapping = assert_crosses(make_torch(), make_keras(), *(array(3, *shape) for shape in shapes))
    assert [note for note in mapping.notes if "two biases" not in note] == []


def test_embedding_crosses_both_ways() -> None:
    words = np.array([[0, 3, 6], [1, 1, 2]])
    assert_crosses(
        nn.Embedding(7, 3), keras.Sequential([keras.Input((3,), dtype="int32"), layers.Embedding(7, 3)]), words
    )


@pytest.mark.parametrize(
    ("first", "second", "stated"),
    [
        (
            nn.GRU(4, 3),
            sequential(STEPS, layers.GRU(3, reset_after=False)),
            "reset_after of 'GRU' is True, but that of",
        ),
        (
            nn.LSTM(4, 3),
            sequential(STEPS, layers.LSTM(3, activation="relu")),
            "activation of 'LSTM' is tanh, but .* relu",
        ),
        (
            nn.LSTM(4, 3),
            sequential(STEPS, layers.LSTM(3, go_backwards=True)),
            "direction of 'LSTM' is forward, but .* backward",
        ),
        (nn.LSTM(4, 3, proj_size=2), sequential(STEPS, layers.LSTM(3)), "LSTM 'LSTM' but lstm 'lstm"),
        (nn.GroupNorm(4, 4), sequential(MAP, layers.GroupNormalization(2)), "groups of 'GroupNorm' is 4, but .* is 2"),
        (nn.Conv2d(4, 4, 3, groups=2), sequential(MAP, layers.Conv2D(4, 3)), "groups of 'Conv2d' is 2, but .* is 1"),
        (nn.PReLU(4), sequential(MAP, layers.PReLU()), "prelu 'PReLU' but PReLU 'p_re_lu"),
        (
            nn.ConvTranspose2d(4, 4, 3, groups=2),
            sequential(MAP, layers.Conv2DTranspose(4, 3)),
            "groups of 'ConvTranspose2d' is 2, but that of",
        ),
        (
            nn.LayerNorm((6, 4)),
            sequential((6, 4), layers.LayerNormalization(axis=(1, 2))),
            "LayerNorm 'LayerNorm' but LayerNormalization 'layer_norm",
        ),
    ],
)
def test_layers_that_compute_something_else_are_refused(first: nn.Module, second: Any, stated: str) -> None:
    with pytest.raises(ltf.ConfigurationError, match=f"(?s){stated}.*starting from this one"):
        lt.WeightMap.between(lt.layers(first), ltf.layers(second))


def test_attention_of_other_heads_is_refused() -> None:
    """The weights would fit."""
    with pytest.raises(ltf.ConfigurationError, match="heads of 'inner' is 2, but that of .* is 4"):
        lt.WeightMap.between(lt.layers(Attention(8, 2)), ltf.layers(attention(4, 2, ATTENDED)))
