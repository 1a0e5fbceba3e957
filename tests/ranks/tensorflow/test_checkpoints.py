"""Stopping and continuing with TensorFlow, and between TensorFlow and PyTorch, on every rank of a job."""

import os
from collections.abc import Callable, Iterator, Sequence
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
from case_selection import selected_cases
from methods import ROUND, methods
from numpy.testing import assert_allclose, assert_array_equal
from torch import nn

import lentando.tensorflow as ltf
import lentando.torch as lt

RATE, BETAS = 1 / 16, (0.875, 1 - 2**-10)  # Keras rounds them to float32, which holds these
HEIGHT, WIDTH = 6, 4


@pytest.fixture(autouse=True)
def wide_numbers() -> Iterator[None]:
    keras.config.set_floatx("float64")
    keras.config.set_dtype_policy("float64")  # other tests have made the default one
    yield
    keras.config.set_floatx("float32")
    keras.config.set_dtype_policy("float32")


def torch_model(seed: int) -> nn.Sequential:
    """All kinds that can be paired but one, and a Dense layer after a flattened map that is not square."""
    torch.manual_seed(seed)
    model = nn.Sequential(
        nn.Conv2d(1, 3, 3, padding=1, bias=False),
        nn.BatchNorm2d(3, eps=1e-3, momentum=0.25),
        nn.Tanh(),
        nn.AvgPool2d(2),
        nn.Flatten(),
        nn.Linear(3 * HEIGHT * WIDTH // 4, 5),
        nn.Tanh(),
        nn.Linear(5, 5),
        nn.Linear(5, 2),
    ).double()
    model[7].requires_grad_(False)
    return model


def keras_model(seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.Input((HEIGHT, WIDTH, 1)),
            keras.layers.Conv2D(3, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.75),
            keras.layers.Activation("tanh"),
            keras.layers.AveragePooling2D(2),
            keras.layers.Flatten(),
            keras.layers.Dense(5, activation="tanh"),
            keras.layers.Dense(5, trainable=False),
            keras.layers.Dense(2),
        ]
    )


def batch(step: int) -> tuple[Any, Any]:
    """Images, channels last, and labels: of this rank at this step, equal in both frameworks."""
    generator = np.random.default_rng([lt.rank(), step])
    return generator.normal(size=(5, HEIGHT, WIDTH, 1)), generator.integers(0, 2, 5)


class TorchRun:
    def __init__(self, method: str, base: str, seed: int = 0) -> None:
        self.model = torch_model(seed)
        if base == "sgd":
            own: Any = torch.optim.SGD(self.model.parameters(), lr=RATE, momentum=0.875, nesterov=True)
        else:
            own = torch.optim.Adam(self.model.parameters(), lr=RATE, betas=BETAS, eps=1e-20, amsgrad=True)
        self.optimizer = lt.DistributedOptimizer(own, model=self.model, **methods()[method])

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            images, labels = batch(step)
            self.optimizer.zero_grad()
            logits = self.model(torch.from_numpy(images).permute(0, 3, 1, 2))
            loss = nn.functional.cross_entropy(logits, torch.from_numpy(labels))
            loss.backward()
            self.optimizer.step(loss=loss)

    def save(self, path: Path) -> Path:
        return lt.save(path, self.optimizer, {"rank": lt.rank()})

    def load(self, path: Path) -> None:
        assert lt.load(path, self.optimizer) == {"rank": lt.rank()}

    def tensors(self) -> dict[str, Any]:
        return {name: tensor.clone().numpy() for name, tensor in self.model.state_dict().items()}


class KerasRun:
    def __init__(self, method: str, base: str, seed: int = 0, graph: bool = False, model: Any = keras_model) -> None:
        self.model = model(seed)
        if base == "sgd":
            own: Any = keras.optimizers.SGD(RATE, momentum=0.875, nesterov=True)
        else:
            own = keras.optimizers.Adam(RATE, *BETAS, epsilon=1e-20, amsgrad=True)
        self.optimizer = ltf.DistributedOptimizer(own, model=self.model, **methods()[method])
        self.loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
        self.step: Callable[..., None] = tf.function(self._step) if graph else self._step

    def _step(self, images: Any, labels: Any) -> None:
        with tf.GradientTape() as tape:
            loss = self.loss(labels, self.model(images, training=True))
        variables = self.model.trainable_variables
        self.optimizer.apply(tape.gradient(loss, variables), variables, loss=loss)

    def train(self, first: int, last: int) -> None:
        for step in range(first, last):
            self.step(*map(tf.constant, batch(step)))

    def save(self, path: Path) -> Path:
        return ltf.save(path, self.optimizer, {"rank": lt.rank()})

    def load(self, path: Path) -> None:
        assert ltf.load(path, self.optimizer) == {"rank": lt.rank()}

    def tensors(self) -> dict[str, Any]:
        return {f"{number}": variable.numpy() for number, variable in enumerate(self.variables())}

    def variables(self) -> list[Any]:
        return [*self.model.weights, *self.optimizer.base_optimizer.variables]


def small_model(seed: int) -> Any:
    keras.utils.set_random_seed(seed)
    return keras.Sequential([keras.Input((HEIGHT, WIDTH, 1)), keras.layers.Flatten(), keras.layers.Dense(2)])


def resumes_bit_identically(make: Callable[[int], KerasRun], path: Path, moments: Sequence[int]) -> None:
    """O20: in a model that was built again, and then in one that is further on."""
    run = make(0)
    last = 2 * ROUND + 1
    for step in range(last):
        if step in moments:
            run.save(path / str(step))
        run.train(step, step + 1)
    again = make(1 + lt.rank())
    for step in reversed(moments):
        again.load(path / str(step))
        again.train(step, last)
        assert int(again.optimizer.iterations) == last
        for (name, mine), other in zip(run.tensors().items(), again.tensors().values(), strict=True):
            assert_array_equal(mine, other, err_msg=f"{name} from step {step}")


EVERY_STEP = range(2 * ROUND + 1)
"""Of two rounds, and the first of a third."""
THOROUGH = ["osgp"]
"""Resumed at every step; the others right after an outer step and inside a round. What a method keeps is saved by code
that knows no framework, and resumed in PyTorch with all of them."""
RESUMED = [
    *((method, "sgd") for method in selected_cases([*THOROUGH, "slowmo", "diloco in fragments"], [*methods()])),
    *selected_cases([], [("slowmo", "adam"), ("bmuf", "adam")]),
    ("slowmo over osgp", "adam"),
]


@pytest.mark.parametrize(("method", "base"), RESUMED)
def test_tensorflow_resumes_bit_identically(method: str, base: str, shared_path: Path) -> None:
    moments = EVERY_STEP if method in selected_cases(THOROUGH, [*methods()]) else (ROUND, ROUND + 2)
    resumes_bit_identically(lambda seed: KerasRun(method, base, seed, model=small_model), shared_path, moments)


@pytest.mark.parametrize(
    ("method", "base"), [("slowmo over osgp", "sgd"), *selected_cases([], [("allreduce", "adam")])]
)
def test_tensorflow_resumes_bit_identically_with_statistics_and_frozen_layers(
    method: str, base: str, shared_path: Path
) -> None:
    resumes_bit_identically(
        lambda seed: KerasRun(method, base, seed), shared_path, selected_cases((2, ROUND + 1), EVERY_STEP)
    )


def test_tensorflow_resumes_bit_identically_in_a_graph(shared_path: Path) -> None:
    run = KerasRun("slowmo", "sgd", graph=True, model=small_model)
    run.train(0, 4)  # of which the graph has not reported the last one
    run.save(shared_path)
    again = KerasRun("slowmo", "sgd", seed=5, graph=True, model=small_model)
    again.train(0, 2)
    again.load(shared_path)
    for continued in (run, again):
        continued.train(4, 2 * ROUND + 1)
    for (name, mine), other in zip(run.tensors().items(), again.tensors().values(), strict=True):
        assert_array_equal(mine, other, err_msg=name)


@pytest.mark.parametrize(
    ("method", "base", "legs"),
    [
        ("slowmo", "sgd", (ROUND, 2 * ROUND)),
        ("bmuf", "adam", (2, 4)),
        ("slowmo over osgp", "sgd", (2, ROUND + 2)),
        *selected_cases(
            [],
            [
                ("slowmo", "adam", (1, ROUND + 1)),
                ("bmuf", "sgd", (ROUND, 2 * ROUND)),
                ("allreduce", "adam", (1, 3)),
            ],
        ),
    ],
)
def test_training_goes_from_torch_to_tensorflow_and_back(
    method: str, base: str, legs: tuple[int, int], shared_path: Path
) -> None:
    last = 3 * ROUND
    straight = TorchRun(method, base)
    straight.train(0, last)
    first = TorchRun(method, base)
    first.train(0, legs[0])
    first.save(shared_path / "first")
    second = KerasRun(method, base, seed=1 + lt.rank())
    second.load(shared_path / "first")
    second.train(*legs)
    second.save(shared_path / "second")
    third = TorchRun(method, base, seed=9)
    third.load(shared_path / "second")
    third.train(legs[1], last)
    found = third.tensors()
    for name, expected in straight.tensors().items():
        # The variance that BatchNorm keeps is the sample's in torch and the batch's in Keras; torch counts batches.
        if not name.endswith(("running_var", "num_batches_tracked")):
            scale = np.abs(expected).max()
            assert_allclose(found[name], expected, rtol=1e-10, atol=1e-10 * scale, err_msg=name)
    assert third.optimizer.report()["rounds"] == straight.optimizer.report()["rounds"]


def test_going_over_and_back_without_a_step_changes_nothing(shared_path: Path) -> None:
    """BatchNorm's variance, frozen layers and moments included; RATE is a power of two, so that no bit is lost."""
    run = TorchRun("bmuf", "sgd")
    run.train(0, 2)
    run.save(shared_path / "there")
    between = KerasRun("bmuf", "sgd", seed=3)
    between.load(shared_path / "there")
    between.save(shared_path / "back")
    back = TorchRun("bmuf", "sgd", seed=4)
    back.load(shared_path / "back")
    found = back.tensors()
    for name, expected in run.tensors().items():
        if "num_batches" not in name:
            assert_array_equal(found[name], expected, err_msg=name)
    for one, other in zip(run.model.parameters(), back.model.parameters(), strict=True):
        if one.requires_grad:
            one_buffer = run.optimizer.state[one]["momentum_buffer"]
            assert torch.equal(one_buffer, back.optimizer.state[other]["momentum_buffer"])


def test_what_cannot_cross_is_refused(shared_path: Path) -> None:
    model = torch_model(0)
    rmsprop = lt.DistributedOptimizer(torch.optim.RMSprop(model.parameters()), model=model)
    run = TorchRun("allreduce", "sgd")
    run.optimizer, run.model = rmsprop, model
    run.train(0, 1)
    run.save(shared_path / "rmsprop")
    other = KerasRun("allreduce", "sgd")
    with pytest.raises(ltf.CheckpointError, match="state of RMSprop cannot be loaded into another framework: only"):
        ltf.load(shared_path / "rmsprop", other.optimizer)
    ltf.load(shared_path / "rmsprop", other.optimizer, optimizer_state="new")
    assert other.optimizer.report()["inner_steps"] == 1


def test_optimizer_with_other_variables_is_refused(shared_path: Path) -> None:
    run = KerasRun("allreduce", "sgd")
    run.save(shared_path)
    model = keras_model(0)
    plain = ltf.DistributedOptimizer(keras.optimizers.SGD(RATE), model=model)
    with pytest.raises(ltf.CheckpointError, match=r"saved SGD and the present one have different .*kernel.momentum'"):
        ltf.load(shared_path, plain)


class Hidden(keras.Model):
    """Flattens where it is not seen."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = keras.layers.Conv2D(3, 3, padding="same")
        self.dense = keras.layers.Dense(2)

    def call(self, images: Any) -> Any:
        return self.dense(tf.reshape(self.conv(images), (-1, 3 * HEIGHT * WIDTH)))


def test_model_whose_layers_are_not_known_is_saved_all_the_same(shared_path: Path) -> None:
    def make() -> Any:
        model = Hidden()
        model(np.zeros((1, HEIGHT, WIDTH, 1)))
        return ltf.DistributedOptimizer(keras.optimizers.SGD(RATE), model=model)

    ltf.save(shared_path / "hidden", make())
    ltf.load(shared_path / "hidden", make())
    same = nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.Flatten(), nn.Linear(3 * HEIGHT * WIDTH, 2)).double()
    other = lt.DistributedOptimizer(torch.optim.SGD(same.parameters(), lr=RATE), model=same)
    with pytest.raises(lt.CheckpointError, match=r"order of the input features of dense '\w+' is not known"):
        lt.load(shared_path / "hidden", other)

    nameless = lt.DistributedOptimizer(torch.optim.SGD(torch_model(0).parameters(), lr=RATE))
    lt.save(shared_path / "nameless", nameless)
    with pytest.raises(
        ltf.CheckpointError, match=r"saved by torch, and which .* \(no model= was given when it was saved"
    ):
        ltf.load(shared_path / "nameless", KerasRun("allreduce", "sgd").optimizer)
