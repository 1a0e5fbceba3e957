"""A base algorithm at work on ranks that are threads, over a small model, for ``check_base_algorithm``."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

import numpy as np

from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import LentandoError
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transport import Array
from lentando.optimizers.rules.algorithm_hooks import hooks_of
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.gradient_layout import gradient_layouts

__all__ = ["AlgorithmSubject", "Arrays", "Rank", "copies", "is_near", "mean_over_ranks"]

T = TypeVar("T")

Arrays: TypeAlias = list[Array]
"""One one-dimensional array per flat buffer: its parameters."""

ENTRIES = (
    Entry("first", (3, 2), "float32", 0),
    Entry("second", (5,), "float32", 1),
    Entry("running_mean", (4,), "float32", None),
    Entry("wide", (7,), "float64", 0),
    Entry("narrow", (6,), "bfloat16", 1),
)
"""A model of three dtypes and two parameter groups, with a statistic."""

RESOLUTION = {"float32": 2.0**-23, "float64": 2.0**-52, "bfloat16": 2.0**-7}
"""Distance between 1 and the next number, by dtype."""

ROUNDINGS = 64
"""Rounding errors, of the largest number's resolution, that sums over a few ranks and steps may have."""

RATE = 0.125


class Rank:
    """One rank with its model.

    Args:
        base: description of the base algorithm.
        transport: transport that connects the ranks.
        start: parameters to begin with, one array per buffer; None for random ones, which differ between ranks.

    Attributes:
        base: as given.
        transport: as given.
        buffers: flat buffers of the model.
        gradients: flat gradients; empty unless the algorithm averages them.
        hooks: hooks of the bound algorithm.
        is_changed_by_bind: whether ``bind`` has changed a buffer.
        steps: number of the next step.
    """

    def __init__(self, base: BaseAlgorithm, transport: ThreadTransport, start: Sequence[Array] | None = None) -> None:
        self.base = base
        self.transport = transport
        self.buffers = [FlatBuffer(layout) for layout in build_layouts(ENTRIES)]
        self.gradients = [FlatBuffer(layout) for layout in gradient_layouts(build_layouts(ENTRIES))]
        for number, buffer in enumerate(self.buffers):
            buffer.array[:] = self._random(1, number, buffer.array)
        if start is not None:
            self.fill(start)
        for number, buffer in enumerate(self.gradients):
            buffer.array[:] = self._random(2, number, buffer.array)
        before = [buffer.array.copy() for buffer in (*self.buffers, *self.gradients)]
        self.hooks = hooks_of(base.bind(transport, self.buffers, self.gradients if base.averages_gradients else []))
        after = [buffer.array for buffer in (*self.buffers, *self.gradients)]
        self.is_changed_by_bind = any(a.tobytes() != b.tobytes() for a, b in zip(after, before, strict=True))
        self.steps = 0

    def parameters(self) -> Arrays:
        """Copies of the parameters."""
        return [buffer.parameters.copy() for buffer in self.buffers]

    def statistics(self) -> Arrays:
        """Copies of the statistics."""
        return [buffer.array[buffer.parameters.size :].copy() for buffer in self.buffers]

    def fill(self, values: Sequence[Array]) -> None:
        """Replace the parameters by these values."""
        for buffer, array in zip(self.buffers, values, strict=True):
            buffer.parameters[:] = array

    def fill_gradients(self) -> None:
        """Set the gradients of the next step, which differ between ranks and steps."""
        for number, buffer in enumerate(self.gradients):
            trained = buffer.array[: buffer.layout.offsets[-1]]
            trained[:] = self._random(3 + self.steps, number, trained)
            buffer.array[trained.size :] = 1

    def step(self, *, is_still: bool = False) -> Arrays:
        """Take a step as a replica does.

        Args:
            is_still: whether the base optimizer leaves the parameters as they are.

        Returns:
            How far the base optimizer has moved the parameters, in float64.
        """
        before = [array.astype(np.float64) for array in self.parameters()]
        self.fill_gradients()
        if self.base.averages_gradients:
            self.hooks.steps.average_gradients()
        if not is_still:
            for buffer, gradient in zip(self.buffers, self.gradients, strict=True):
                moved = gradient.array[: buffer.parameters.size] * gradient.array.dtype.type(RATE)
                buffer.parameters[:] = buffer.parameters - moved
        moves = [array.astype(np.float64) - old for array, old in zip(self.parameters(), before, strict=True)]
        self.hooks.steps.after_step()
        self.steps += 1
        self.transport.barrier()  # so that the messages of this step have arrived before the next one, in every run
        return moves

    def run(self, steps: int, *, is_still: bool = False) -> Arrays:
        """Take several steps; returns the sum of the moves."""
        total: Arrays = [np.zeros(buffer.parameters.size) for buffer in self.buffers]
        for _ in range(steps):
            total = [a + b for a, b in zip(total, self.step(is_still=is_still), strict=True)]
        return total

    def prepared(self) -> Arrays:
        """Copies of the parameters after ``prepare_average``."""
        self.hooks.outer_average.prepare_average()
        return self.parameters()

    def outer_average(self) -> Arrays:
        """Form the exact average and adopt it; returns copies of it."""
        self.hooks.outer_average.prepare_average()
        means: Arrays = []
        for buffer in self.buffers:
            wide = buffer.parameters.astype(np.float64)
            means.append(self.transport.allgather(wide).mean(axis=0).astype(buffer.array.dtype))
        self.fill(means)
        self.hooks.outer_average.adopt_consensus()
        return means

    def _random(self, seed: int, number: int, like: Array) -> Array:
        generator = np.random.default_rng([seed, number, self.transport.rank])
        return generator.normal(size=like.shape).astype(like.dtype)


@dataclass(frozen=True)
class AlgorithmSubject:
    """The base algorithm that is checked, in a world of one size.

    Args:
        make_base: makes the description.
        size: number of ranks.
        timeout_seconds: seconds after which ranks that wait for each other are given up.
    """

    make_base: Callable[[], BaseAlgorithm]
    size: int
    timeout_seconds: float

    @property
    def base(self) -> BaseAlgorithm:
        """A new description of the algorithm."""
        return self.make_base()

    def run(
        self,
        work: Callable[[Rank], T],
        starts: Sequence[Sequence[Array]] | None = None,
        size: int | None = None,
    ) -> list[T]:
        """Call a function once per rank, in threads; returns the results by rank.

        Args:
            work: function of a rank.
            starts: parameters to begin with, by rank; None for random ones.
            size: number of ranks; None for that of the subject.

        Raises:
            AssertionError: if the algorithm raises one of Lentando's errors, such as that of an expired wait.
        """
        size = self.size if size is None else size

        def on_rank(transport: ThreadTransport) -> T:
            return work(Rank(self.make_base(), transport, None if starts is None else starts[transport.rank]))

        try:
            return run_ranks(size, on_rank, timeout_seconds=self.timeout_seconds)
        except LentandoError as error:
            raise AssertionError(f"{self.name(size)}: {type(error).__name__}: {error}") from error

    def expect(self, condition: bool, message: str, size: int | None = None) -> None:
        """Raise an error that names the algorithm and the world size unless a promise is kept."""
        if not condition:
            raise AssertionError(f"{self.name(self.size if size is None else size)}: {message}")

    def name(self, size: int) -> str:
        """The algorithm and the number of ranks, for a message."""
        return f"{self.base!r} on {size} rank{'s' if size > 1 else ''}"


def copies(state: Any) -> Any:
    """A state dict with copied arrays."""
    if isinstance(state, dict):
        return {key: copies(value) for key, value in state.items()}
    if isinstance(state, list | tuple):
        return type(state)(copies(value) for value in state)
    return state.copy() if isinstance(state, np.ndarray) else state


def mean_over_ranks(by_rank: Sequence[Arrays]) -> Arrays:
    """Means in float64 of arrays, given as one list per rank."""
    return [np.mean([array.astype(np.float64) for array in arrays], axis=0) for arrays in zip(*by_rank, strict=True)]


def is_near(found: Array, expected: Array, dtype: np.dtype[Any], tolerance: float | None = None) -> bool:
    """Whether arrays are equal up to rounding errors.

    Args:
        found: array to compare.
        expected: array in float64.
        dtype: dtype of the buffer in which the numbers were.
        tolerance: largest difference, relative to the largest number; None for a few rounding errors of the dtype.
    """
    scale = max(1.0, float(np.abs(expected).max(initial=0.0)))
    if tolerance is None:
        tolerance = ROUNDINGS * max(RESOLUTION[accumulator_dtype(dtype).name], RESOLUTION[dtype.name] / ROUNDINGS)
    return bool((np.abs(found.astype(np.float64) - expected) <= tolerance * scale).all())
