"""The same training in PyTorch and in Keras, side by side on the same ranks: the same weights come out.

Where the two base optimizers differ, they are set to agree: Keras folds the learning rate into SGD's velocity, which
is the same while it is constant; it corrects Adam's bias before epsilon is added, so epsilon is next to nothing; and it
passes learning rates, momenta and betas through float32, so these are numbers that it holds exactly. BatchNorm's
epsilon is Keras's; its running variance is left out, for torch divides by n - 1 there.
"""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
import torch
from numpy.typing import NDArray

import lentando.tensorflow as tensorflow_lt
import lentando.torch as torch_lt

PERIOD, OUTER_STEPS, BATCH = 3, 20, 8
RATE, MOMENTUM, BETAS, EPSILON = 0.0625, 0.5, (0.875, 0.96875), 1e-30

OPTIMIZERS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any]]] = {
    "nesterov": (
        lambda: keras.optimizers.SGD(RATE, momentum=MOMENTUM, nesterov=True),
        lambda parameters: torch.optim.SGD(parameters, lr=RATE, momentum=MOMENTUM, nesterov=True),
    ),
    "adam": (
        lambda: keras.optimizers.Adam(RATE / 8, *BETAS, epsilon=EPSILON),
        lambda parameters: torch.optim.Adam(parameters, lr=RATE / 8, betas=BETAS, eps=EPSILON),
    ),
}
METHODS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "allreduce": lambda lt, base, model: lt.DistributedOptimizer(base, model=model),
    "localsgd": lambda lt, base, model: lt.DistributedOptimizer(base, model=model, base=lt.LocalSGD(), period=PERIOD),
    "slowmo": lambda lt, base, model: lt.SlowMo(base, model=model, period=PERIOD),
    "sgp": lambda lt, base, model: lt.DistributedOptimizer(base, model=model, base=lt.SGP()),
    "osgp": lambda lt, base, model: lt.DistributedOptimizer(base, model=model, base=lt.OSGP(deterministic=True)),
    "slowmo, sgp": lambda lt, base, model: lt.SlowMo(base, model=model, base=lt.SGP(), period=PERIOD),
}


def dense_models(dtype: str) -> tuple[keras.Model, torch.nn.Module]:
    ours = keras.Sequential(
        [
            keras.layers.Input((4,), dtype=dtype),
            keras.layers.Dense(6, activation="tanh", dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )
    theirs = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 1)).double()
    return ours, theirs


def convolutional_models(dtype: str) -> tuple[keras.Model, torch.nn.Module]:
    ours = keras.Sequential(
        [
            keras.layers.Input((5, 5, 2), dtype=dtype),
            keras.layers.Conv2D(4, 3, padding="same", use_bias=False, dtype=dtype),
            keras.layers.BatchNormalization(momentum=0.9, dtype=dtype),
            keras.layers.ReLU(dtype=dtype),
            keras.layers.GlobalAveragePooling2D(dtype=dtype),
            keras.layers.Dense(1, dtype=dtype),
        ]
    )
    theirs = torch.nn.Sequential(
        torch.nn.Conv2d(2, 4, 3, padding=1, bias=False),
        torch.nn.BatchNorm2d(4, eps=1e-3),
        torch.nn.ReLU(),
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.Flatten(),
        torch.nn.Linear(4, 1),
    )
    return ours, theirs


def as_torch(array: NDArray[Any]) -> NDArray[Any]:
    """A kernel in torch's order of axes."""
    return array.transpose({4: (3, 2, 0, 1), 2: (1, 0)}.get(array.ndim, range(array.ndim)))


def pairs(ours: keras.Model, theirs: torch.nn.Module) -> list[tuple[str, NDArray[Any], torch.Tensor]]:
    """Keras's weights in torch's order of axes, and torch's: trained ones, and running means."""
    trained = zip(ours.trainable_variables, theirs.parameters(), strict=True)
    means = zip(
        (v for v in ours.weights if v.path.endswith("moving_mean")),
        (b for name, b in theirs.named_buffers() if name.endswith("running_mean")),
        strict=True,
    )
    return [(v.path, as_torch(v.numpy()), tensor.detach()) for v, tensor in [*trained, *means]]


def difference(kind: str, optimizer: str, method: str) -> float:
    """Train both; the largest difference of a weight relative to the largest weight of its tensor, over all ranks."""
    rank = torch_lt.rank()
    dtype, make = ("float64", dense_models) if kind == "dense" else ("float32", convolutional_models)
    keras.utils.set_random_seed(1)
    ours, theirs = make(dtype)
    with torch.no_grad():
        for _, value, tensor in pairs(ours, theirs):
            tensor.copy_(torch.from_numpy(value.copy()))
    make_ours, make_theirs = OPTIMIZERS[optimizer]
    one = METHODS[method](tensorflow_lt, make_ours(), ours)
    other = METHODS[method](torch_lt, make_theirs(theirs.parameters()), theirs)

    @tf.function
    def step(inputs: tf.Tensor, targets: tf.Tensor) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(ours(inputs, training=True) - targets))
        one.apply(tape.gradient(loss, ours.trainable_variables), ours.trainable_variables, loss=loss)

    for number in range(PERIOD * OUTER_STEPS):
        generator = np.random.default_rng([rank, number])
        inputs = generator.normal(size=(BATCH, *ours.input_shape[1:])).astype(dtype)
        targets = np.sin(inputs.reshape(BATCH, -1).sum(1, keepdims=True) + rank).astype(dtype)
        step(tf.constant(inputs), tf.constant(targets))
        other.zero_grad()
        channels_first = np.moveaxis(inputs, -1, 1).copy()
        loss = (theirs(torch.from_numpy(channels_first)) - torch.from_numpy(targets)).square().mean()
        loss.backward()
        other.step(loss=loss)

    for report in (one.report(), other.report()):
        assert report["inner_steps"] == PERIOD * OUTER_STEPS
        assert report["rounds"] in (0, OUTER_STEPS)
    own = max(
        float(np.abs(value - tensor.numpy()).max() / np.abs(value).max()) for _, value, tensor in pairs(ours, theirs)
    )
    return max(torch_lt.allgather_object(own))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_float64(optimizer: str, method: str) -> None:
    found = difference("dense", optimizer, method)
    print(f"float64, {optimizer}, {method}: {found:.1e}")
    assert found <= 1e-10


@pytest.mark.parametrize(
    ("optimizer", "method"),
    [("nesterov", "slowmo, sgp"), ("nesterov", "allreduce"), ("adam", "slowmo"), ("adam", "osgp")],
)
def test_float32_with_batch_norm(optimizer: str, method: str) -> None:
    found = difference("convolutional", optimizer, method)
    print(f"float32, {optimizer}, {method}: {found:.1e}")
    assert found <= 2e-5
