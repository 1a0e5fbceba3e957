"""Training that continues in the other framework, of models with attention, gates, and features of several origins."""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lentando.comm import world

if world.size() > 3:
    pytest.skip("two frameworks take long to load on many ranks that share two cores", allow_module_level=True)
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")

import keras
import numpy as np
import tensorflow as tf
import torch
from keras import layers as L  # noqa: N812
from methods import ROUND, methods
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

import lentando.tensorflow as ltf
import lentando.torch as lt

RATE, BETAS = 1 / 16, (0.875, 1 - 2**-10)  # Keras rounds them to float32, which holds these
WORDS, STEPS, SIZE, IMAGE = 7, 4, 6, (4, 3, 2)


@pytest.fixture(autouse=True)
def wide_numbers() -> Iterator[None]:
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


class Reader(nn.Module):
    """A Transformer that reads words, then a GRU, and a convolution that sees an image."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(WORDS, SIZE), nn.Embedding(STEPS, SIZE)
        layer = nn.TransformerEncoderLayer(SIZE, 2, 8, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.gru = nn.GRU(SIZE, 3, batch_first=True)
        self.conv = nn.Conv2d(2, 3, 2)
        self.out = nn.Linear(3 + 18, 2)

    def forward(self, words: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        x = self.encoder(self.words(words) + self.places.weight)
        ends = self.gru(x)[0][:, -1], self.conv(images.permute(0, 3, 1, 2)).tanh().flatten(1)
        result: torch.Tensor = self.out(torch.cat(ends, 1))
        return result


class Places(L.Layer):
    """Adds what stands for each place."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = L.Embedding(STEPS, SIZE)

    def call(self, x: Any) -> Any:
        return x + self.embedding(keras.ops.arange(STEPS))


def encoder_layer(x: Any) -> Any:
    attended = L.MultiHeadAttention(2, SIZE // 2)(x, x)
    x = L.LayerNormalization(epsilon=1e-5)(L.Add()([x, attended]))
    return L.LayerNormalization(epsilon=1e-5)(L.Add()([x, L.Dense(SIZE)(L.Dense(8, activation="relu")(x))]))


def keras_reader() -> Any:
    words, images = keras.Input((STEPS,), dtype="int32"), keras.Input(IMAGE)
    x = encoder_layer(Places()(L.Embedding(WORDS, SIZE)(words)))
    seen = L.Flatten()(L.Conv2D(3, 2, activation="tanh")(images))
    return keras.Model([words, images], L.Dense(2)(L.Concatenate()([L.GRU(3)(x), seen])))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.words, self.lstm, self.out = nn.Embedding(WORDS, 3), nn.LSTM(3, 4, batch_first=True), nn.Linear(4, 2)

    def forward(self, words: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.lstm(self.words(words))[0][:, -1])
        return result


def keras_recurrent() -> Any:
    words, images = keras.Input((STEPS,), dtype="int32"), keras.Input(IMAGE)
    return keras.Model([words, images], L.Dense(2)(L.LSTM(4)(L.Embedding(WORDS, 3)(words))))


def batch(step: int) -> tuple[Any, Any, Any]:
    """Words, images and labels: of this rank at this step, equal in both frameworks."""
    generator = np.random.default_rng([lt.rank(), step])
    words, images = generator.integers(0, WORDS, (5, STEPS)), generator.normal(size=(5, *IMAGE))
    return words, images, generator.integers(0, 2, 5)


class TorchRun:
    def __init__(self, method: str, base: str, seed: int = 0, model: Any = Reader) -> None:
        torch.manual_seed(seed)
        self.model = model().double()
        if base == "sgd":
            own: Any = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.875, nesterov=True)
        else:
            own = torch.optim.Adam(self.model.parameters(), lr=RATE, betas=BETAS, eps=1e-12)
        self.optimizer = lt.DistributedOptimizer(own, model=self.model, **methods()[method])

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.optimizer.zero_grad()
            loss = nn.functional.cross_entropy(self(step), torch.from_numpy(batch(step)[-1]))
            loss.backward()
            self.optimizer.step(loss=loss)

    def __call__(self, step: int) -> torch.Tensor:
        words, images, _ = batch(step)
        found: torch.Tensor = self.model(torch.from_numpy(words), torch.from_numpy(images))
        return found

    def state(self, key: str) -> dict[str, Any]:
        return {name: self.optimizer.state[p][key].numpy() for name, p in self.model.named_parameters()}


class KerasRun:
    def __init__(self, method: str, base: str, seed: int = 0, model: Any = keras_reader) -> None:
        keras.utils.set_random_seed(seed)
        self.model = model()
        if base == "sgd":
            own: Any = keras.optimizers.SGD(RATE, momentum=0.875, nesterov=True)
        else:
            own = keras.optimizers.Adam(RATE, *BETAS, epsilon=1e-12)
        self.optimizer = ltf.DistributedOptimizer(own, model=self.model, **methods()[method])
        self.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            with tf.GradientTape() as tape:
                loss = self.loss(batch(step)[-1], self(step))
            variables = self.model.trainable_variables
            # Keras squares the gradients of a word that occurs twice one by one, where they are sparse.
            gradients = map(tf.convert_to_tensor, tape.gradient(loss, variables))
            self.optimizer.apply(list(gradients), variables, loss=loss)

    def __call__(self, step: int) -> Any:
        return self.model(list(batch(step)[:2]), training=True)


def assert_same_outputs(one: TorchRun, other: KerasRun) -> None:
    # Keras computes parts of attention and normalization in float32.
    assert_allclose(other(99).numpy(), one(99).detach().numpy(), rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("method", "base", "legs"),
    [("slowmo", "sgd", (ROUND + 1, 2 * ROUND + 1)), ("bmuf", "adam", (2, ROUND))],
)
def test_training_of_a_transformer_continues_in_the_other_framework(
    method: str, base: str, legs: tuple[int, int], shared_path: Path, caplog: Any
) -> None:
    """To the same weights as without a change: slow momentum, anchor, momentum and moments come along in parts."""
    last = 3 * ROUND
    straight = TorchRun(method, base)
    straight.train(0, last)
    first = TorchRun(method, base)
    first.train(0, legs[0])
    lt.save(shared_path / "first", first.optimizer)
    second = KerasRun(method, base, seed=1 + lt.rank())
    ltf.load(shared_path / "first", second.optimizer)
    if lt.rank() == 0:
        assert "while the layers of the models come in another order, were paired in the order" in caplog.text
        assert "'encoder.layers.0.norm1' and 'layer_normalization" in caplog.text
    assert_same_outputs(first, second)
    second.train(*legs)
    ltf.save(shared_path / "second", second.optimizer)
    third = TorchRun(method, base, seed=9)
    lt.load(shared_path / "second", third.optimizer)
    assert_same_outputs(third, second)
    third.train(legs[1], last)
    found = third.model.state_dict()
    for name, expected in straight.model.state_dict().items():
        # The gradient of a key's bias is rounding errors, which Adam makes steps of.
        assert_allclose(found[name], expected, rtol=1e-6, atol=1e-6, err_msg=name)


def test_going_over_and_back_without_a_step_changes_nothing(shared_path: Path) -> None:
    run = TorchRun("bmuf", "adam")
    run.train(0, 2)
    lt.save(shared_path / "there", run.optimizer)
    between = KerasRun("bmuf", "adam", seed=3)
    ltf.load(shared_path / "there", between.optimizer)
    ltf.save(shared_path / "back", between.optimizer)
    back = TorchRun("bmuf", "adam", seed=4)
    lt.load(shared_path / "back", back.optimizer)
    for name, expected in run.model.state_dict().items():
        assert torch.equal(back.model.state_dict()[name], expected), name
    for key in ("exp_avg", "exp_avg_sq"):
        for name, array in run.state(key).items():
            assert_array_equal(back.state(key)[name], array, err_msg=f"{key} of {name}")


@pytest.mark.parametrize("base", ["sgd", "adam"])
def test_two_biases_become_one_and_two_again(base: str, shared_path: Path, caplog: Any) -> None:
    """Their sum; the base optimizer's state of both, which is equal, becomes that of the one, and comes back."""
    run = TorchRun("slowmo", base, model=Recurrent)
    run.train(0, ROUND + 2)
    lt.save(shared_path / "there", run.optimizer)
    between = KerasRun("slowmo", base, seed=3, model=keras_recurrent)
    ltf.load(shared_path / "there", between.optimizer)
    assert_same_outputs(run, between)
    if lt.rank() == 0:
        assert "has two biases where the other has one, their sum" in caplog.text
    ltf.save(shared_path / "back", between.optimizer)
    back = TorchRun("slowmo", base, seed=4, model=Recurrent)
    lt.load(shared_path / "back", back.optimizer)
    assert_same_outputs(back, between)
    own, others = run.model.state_dict(), back.model.state_dict()
    assert not others["lstm.bias_hh_l0"].any()
    assert_allclose(others["lstm.bias_ih_l0"], own["lstm.bias_ih_l0"] + own["lstm.bias_hh_l0"], rtol=1e-15)
    for key in ("momentum_buffer",) if base == "sgd" else ("exp_avg", "exp_avg_sq"):
        for name, array in run.state(key).items():
            assert_allclose(back.state(key)[name], array, rtol=1e-12, atol=1e-15, err_msg=f"{key} of {name}")


class Normalized(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 2)
        self.one, self.two, self.out = nn.BatchNorm2d(3), nn.BatchNorm2d(3), nn.Linear(3, 2)

    def forward(self, words: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
        x = self.two(self.one(self.conv(images.permute(0, 3, 1, 2))))
        result: torch.Tensor = self.out(x.mean((2, 3)))
        return result


def keras_normalized(**settings: Any) -> Any:
    words, images = keras.Input((STEPS,), dtype="int32"), keras.Input(IMAGE)
    x = L.BatchNormalization(**settings)(L.BatchNormalization(**settings)(L.Conv2D(3, 2)(images)))
    return keras.Model([words, images], L.Dense(2)(L.GlobalAveragePooling2D()(x)))


def test_settings_that_differ_are_warned_of_once(shared_path: Path, caplog: Any, monkeypatch: Any) -> None:
    lt.save(shared_path, TorchRun("slowmo", "sgd", model=Normalized).optimizer)
    alike = KerasRun("slowmo", "sgd", model=lambda: keras_normalized(epsilon=1e-5, momentum=0.9))
    ltf.load(shared_path, alike.optimizer)
    assert "BatchNorm" not in caplog.text
    assert "batch norm" not in caplog.text
    run = KerasRun("slowmo", "sgd", model=keras_normalized)
    mapping = ltf.WeightMap.between(lt.layers(Normalized()), ltf.layers(run.model))
    for given in (None, ltf.WeightMap(mapping.rules.values())):
        caplog.clear()
        ltf.load(shared_path, run.optimizer, given)
        warnings = [record.getMessage() for record in caplog.records if "was loaded into" in record.getMessage()]
        assert len(warnings) == (lt.rank() == 0)
        for warning in warnings:
            first, second = warning.splitlines()[1:]
            assert first.startswith("- epsilon of batch norm: 1e-05 in 'one', 0.001 in 'batch_norm")
            assert first.endswith(", and so in 1 more")
            assert second.startswith("- momentum of batch norm: 0.1 in 'one', 0.01")

    def undescribed(*_: Any) -> Any:
        raise ltf.ConfigurationError("a layer of another world")

    monkeypatch.setattr("lentando.tensorflow.checkpoint_state.layers", undescribed)
    ltf.load(shared_path, run.optimizer, ltf.WeightMap(mapping.rules.values()))
    assert lt.rank() > 0 or "whether settings differ is not known: a layer of another world" in caplog.text
    with pytest.raises(ltf.CheckpointError, match="a layer of another world"):
        ltf.load(shared_path, run.optimizer)


def test_layers_that_cannot_cross_are_refused_with_a_mapping_to_start_from(shared_path: Path) -> None:
    lt.save(shared_path, TorchRun("slowmo", "sgd", model=Recurrent).optimizer)

    def other() -> Any:
        words, images = keras.Input((STEPS,), dtype="int32"), keras.Input(IMAGE)
        x = L.Embedding(WORDS, 3)(words)
        return keras.Model([words, images], L.Dense(2)(L.RNN(L.LSTMCell(4))(x)))

    run = KerasRun("slowmo", "sgd", seed=1, model=other)
    before = [variable.numpy() for variable in run.model.weights]
    with pytest.raises(
        ltf.CheckpointError, match="(?s)lstm 'lstm' but RNN 'rnn.*lt.WeightRule.'words.weight', 'embedding/embed"
    ):
        ltf.load(shared_path, run.optimizer)
    for variable, value in zip(run.model.weights, before, strict=True):
        assert_array_equal(variable.numpy(), value)
