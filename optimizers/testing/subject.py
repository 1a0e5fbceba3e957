"""What ``check_framework`` needs in addition to the adapter: a small model that it can read, set and train."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol, TypeAlias

from lentando.comm.flat import describe
from lentando.comm.transport import Array
from lentando.optimizers.framework import Framework
from lentando.optimizers.testing.values import random_values, trained_entries

__all__ = ["RATE", "STEPS", "FrameworkSubject", "MakeSubject", "described", "take_step", "train"]


class FrameworkSubject(Protocol):
    """A framework adapter over a small model, with the means to act on the model as a program and its optimizer do.

    The model has several parameters, in more than one parameter group if the framework has parameter groups, and, if
    the framework averages statistics such as BatchNorm's, some of these. All tensors are in row-major order. The base
    optimizer keeps momentum, and its step is proportional to the learning rate.

    In all mappings, keys are names of entries of ``framework.buffers``, and arrays have the shape and dtype of the
    entry.

    Attributes:
        framework: the adapter.
    """

    framework: Framework

    def read(self) -> Mapping[str, Array]:
        """Copies of the model's parameters and averaged statistics, taken from the model and not from the buffers."""

    def assign(self, values: Mapping[str, Array]) -> None:
        """Set parameters and statistics of the model by the means that a user's program has for it."""

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        """Set the base optimizer's learning rates, one per parameter group."""

    def set_gradients(self, gradients: Mapping[str, Array]) -> None:
        """Set the gradients of the next step, one per parameter."""

    def gather_gradients(self) -> None:
        """Copy the gradients into ``framework.gradients``, as the adapter does before they are averaged."""

    def scatter_gradients(self) -> None:
        """Make the values in ``framework.gradients`` the gradients of the next step, as the adapter does afterwards."""

    def step(self) -> None:
        """Take a step of the base optimizer along the gradients, without any communication."""


MakeSubject: TypeAlias = Callable[[], FrameworkSubject]
"""Makes an adapter over a new model. All models that one such function makes are equal."""

STEPS = 3
"""Steps after which the state of an optimizer is compared."""

RATE = 0.125
"""Learning rate of those steps: an exact number in every dtype."""


def take_step(subject: FrameworkSubject, number: int) -> None:
    """Take a step along gradients that depend on its number alone."""
    subject.set_gradients(random_values(trained_entries(subject.framework), 10, number))
    subject.step()


def train(subject: FrameworkSubject, steps: int) -> None:
    """Take steps of the base optimizer, without communication."""
    for number in range(steps):
        take_step(subject, number)


def described(framework: Framework) -> list[list[object]]:
    """The layouts of the flat buffers, for comparison."""
    return describe(buffer.layout for buffer in framework.buffers)
