"""Model, methods and recording of the training of error_runtime.py, on real or simulated ranks."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

import lentando.torch as lt
from lentando.comm.world import transport

Array: TypeAlias = NDArray[Any]

SYNCHRONOUS = "synchronous SGD"
ADAPTIVE = ("AdaComm", "AdaComm, slow momentum")
FIXED = ("period 4", "period 16", "period 64")
METHODS = (SYNCHRONOUS, *FIXED, *ADAPTIVE)
POINTS = 400
"""Maximum number of points of a curve."""


@dataclass
class Course:
    """Recorded course of one training run, by the clock of rank 0.

    Attributes:
        steps: number of inner steps.
        seconds: duration of these steps.
        curve: seconds and training loss (including weight decay) of the averaged model.
        periods: seconds from which on a period was used, and the period.
    """

    steps: int = 0
    seconds: float = 0.0
    curve: list[tuple[float, float]] = field(default_factory=list)
    periods: list[tuple[float, int]] = field(default_factory=list)


@lru_cache
def digits() -> tuple[Array, Array]:
    """Return all 1797 handwritten digits of scikit-learn, because only the training loss is measured."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    images = images / 16.0
    return (images - images.mean(axis=0)).astype(np.float32), labels


class Perceptron:
    """A network of 64 pixels, one hidden layer and 10 classes, with a manual gradient, which is faster than autograd.

    Attributes:
        flat: all parameters in one tensor, which is the parameter of PyTorch's optimizer.
    """

    def __init__(self, seed: int, options: argparse.Namespace) -> None:
        self._shapes = [(64, options.hidden), (options.hidden,), (options.hidden, 10), (10,)]
        generator = np.random.default_rng(seed)
        parts = [generator.normal(scale=shape[0] ** -0.5, size=shape) * (len(shape) > 1) for shape in self._shapes]
        self.flat = nn.Parameter(torch.from_numpy(np.concatenate([part.ravel() for part in parts]).astype(np.float32)))
        self.flat.grad = torch.zeros_like(self.flat)

    def bind(self) -> None:
        """Create the views of the parameters, after the optimizer has moved them to its buffer."""
        assert self.flat.grad is not None
        self._parameters = self._cut(self.flat.detach().numpy())
        self._gradients = self._cut(self.flat.grad.numpy())

    def backward(self, images: Array, labels: Array) -> float:
        """Return the mean cross-entropy of a batch, and store its gradient."""
        second = self._parameters[2]
        hidden, probabilities = self._forward(images, self._parameters)
        rows = np.arange(len(labels))
        loss = -float(np.log(probabilities[rows, labels]).mean())
        probabilities[rows, labels] -= 1
        probabilities /= len(labels)
        to_hidden = (probabilities @ second.T) * (hidden > 0)
        for gradient, value in zip(
            self._gradients,
            (images.T @ to_hidden, to_hidden.sum(axis=0), hidden.T @ probabilities, probabilities.sum(axis=0)),
            strict=True,
        ):
            gradient[...] = value
        return loss

    def training_loss(self, flat: Array, options: argparse.Namespace) -> float:
        """Return the objective of SGD with weight decay over all of the data."""
        images, labels = digits()
        _, probabilities = self._forward(images, self._cut(flat))
        loss = -np.log(probabilities[np.arange(len(labels)), labels]).mean(dtype=np.float64)
        return float(loss) + options.weight_decay / 2 * float(np.square(flat, dtype=np.float64).sum())

    def _cut(self, flat: Array) -> list[Array]:
        ends = np.cumsum([np.prod(shape) for shape in self._shapes])[:-1]
        return [part.reshape(shape) for part, shape in zip(np.split(flat, ends), self._shapes, strict=True)]

    @staticmethod
    def _forward(images: Array, parameters: list[Array]) -> tuple[Array, Array]:
        first, first_bias, second, second_bias = parameters
        hidden = np.maximum(images @ first + first_bias, 0)
        scores = hidden @ second + second_bias
        scores -= scores.max(axis=1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=1, keepdims=True)
        return hidden, np.maximum(scores, 1e-30, out=scores)


def batches(seed: int, options: argparse.Namespace) -> Iterator[tuple[Array, Array]]:
    images, labels = digits()
    generator = np.random.default_rng([seed, lt.rank()])
    while True:
        for chosen in generator.integers(len(labels), size=(256, options.batch_size)):
            yield images[chosen], labels[chosen]


def wrap(method: str, model: Perceptron, options: argparse.Namespace, interval: float) -> lt.DistributedOptimizer:
    sgd = torch.optim.SGD([model.flat], lr=options.lr, weight_decay=options.weight_decay, foreach=False)
    if method in ADAPTIVE:
        optimizer = lt.AdaComm(
            sgd,
            initial_period=options.initial_period,
            interval_seconds=interval,
            slow_momentum=options.slow_momentum if method == ADAPTIVE[1] else 0.0,
        )
    else:
        period = 1 if method == SYNCHRONOUS else int(method.split()[1])
        optimizer = lt.DistributedOptimizer(sgd, base=lt.LocalSGD(), period=period)
    model.bind()
    return optimizer


def train(
    method: str,
    seed: int,
    options: argparse.Namespace,
    interval_seconds: float,
    limit: Callable[[int, float], bool],
    points_apart_seconds: float,
) -> Course:
    """Train on every rank until ``limit(steps, seconds)``. Returns the course that rank 0 recorded."""
    lt.init()
    model = Perceptron(seed, options)
    optimizer = wrap(method, model, options, interval_seconds)
    clock = transport().clock
    lt.barrier()
    started, checked = clock(), 0
    course = Course()
    snapshots = [(0.0, model.flat.detach().numpy().copy())]
    ends = period = optimizer.period
    course.periods.append((0.0, period))
    for batch in batches(seed, options):
        optimizer.step(loss=compute(model, batch, options))
        course.steps += 1
        if course.steps < ends:
            continue
        # At the end of a round every replica is equal to the average.
        seconds = clock() - started
        after = optimizer.period
        if after != period:
            course.periods.append((seconds, after))
        ends, period = course.steps + after, after
        if lt.rank() == 0 and seconds >= snapshots[-1][0] + points_apart_seconds:
            snapshots.append((seconds, model.flat.detach().numpy().copy()))
        if course.steps >= checked + 16:  # rarely, because it sends a message
            checked = course.steps
            course.seconds = float(lt.broadcast(torch.tensor([seconds], dtype=torch.float64), root_rank=0))
            if limit(course.steps, course.seconds):
                break
    if lt.rank() == 0:
        for seconds, parameters in snapshots[:: max(1, len(snapshots) // POINTS)]:
            course.curve.append((seconds, model.training_loss(parameters, options)))
    return course


def compute(model: Perceptron, batch: tuple[Array, Array], options: argparse.Namespace) -> float:
    started = time.perf_counter()
    loss = model.backward(*batch)
    if options.step_seconds:
        time.sleep(max(0.0, options.step_seconds - (time.perf_counter() - started)))
    return loss


def train_each(
    methods: Sequence[str],
    seed: int,
    options: argparse.Namespace,
    mean_step_seconds: float,
    run: Callable[[Callable[[], Course]], Course],
) -> dict[str, Course]:
    """Train with each method for the time that synchronous SGD, the first one, needs for its steps.

    Args:
        methods: names of the methods.
        seed: seed of initial weights and batches.
        options: parsed command line.
        mean_step_seconds: mean compute time of a step (Y).
        run: function that trains on all ranks, and returns the course of rank 0.
    """
    interval_seconds = options.interval * mean_step_seconds
    courses: dict[str, Course] = {}
    for method in methods:
        if method == SYNCHRONOUS:
            ends, apart_seconds = partial(_after_steps, options.steps), 0.0
        else:
            budget_seconds = courses[SYNCHRONOUS].seconds
            ends, apart_seconds = partial(_after_seconds, budget_seconds), budget_seconds / POINTS
        courses[method] = run(partial(train, method, seed, options, interval_seconds, ends, apart_seconds))
    return courses


def _after_steps(limit: int, steps: int, seconds: float) -> bool:
    return steps >= limit


def _after_seconds(limit: float, steps: int, seconds: float) -> bool:
    return seconds >= limit
