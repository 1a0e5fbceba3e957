"""Notices weights that the program sets between two steps: a rollback, loaded weights, a layer that is reinitialized.

The anchor of an outer step and its slow momentum belong to the weights that training has reached. The watch of a
framework adapter reports whether the program has replaced these weights.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from lentando.comm.flat import FlatBuffer, FlatLayout
from lentando.comm.transport import Array

__all__ = ["NoWatch", "SampledWeights", "WeightWatch", "is_jump", "sampled_elements"]

SAMPLES = 64
"""Number of elements that are compared, at least one of each parameter. A hundred parameters take a microsecond."""

FAR, FARTHER = 1.25, 2.0
"""Length of a change by the program, relative to that of the last step, up to which it counts as part of that step.

Clipping of weights, masks of pruned weights and other projections on constraints that the weights met before the step
move them at most as far as the step did. On a convex set they also end at most that far from where the step began,
because projections do not expand distances. The lengths are those of a sample, so that either may appear longer than it
is, but not both at once.
"""


class WeightWatch(Protocol):
    """Compares the weights at the beginning of a step with those at the end of the step before.

    Attributes:
        found: whether the program has set weights since the last ``reset``.
    """

    @property
    def found(self) -> bool:
        """Whether the program has set weights since the last ``reset``. May wait for a device."""

    def look(self) -> None:
        """Compare the weights with those of the last ``mark``, at the beginning of a step."""

    def mark(self) -> None:
        """Record the weights that training has produced: at the end of a step, or of an operation between two steps."""

    def forget(self) -> None:
        """Compare nothing until the next ``mark``: the weights, or state that belongs to them, are being replaced."""

    def reset(self, found: bool = False) -> None:
        """Set ``found``: False once an outer step has taken the new weights into account, or a checkpoint's value."""


def is_jump(before: Array, after: Array, now: Array) -> bool:
    """Whether the program has moved the weights farther than a correction of the last step would.

    Args:
        before: elements at the beginning of the last step, in float32 or float64.
        after: the same elements at its end.
        now: the same elements at the beginning of the next step.
    """
    with np.errstate(all="ignore"):
        step, change, both = (
            np.subtract(*pair, dtype=np.float64) for pair in ((after, before), (now, after), (now, before))
        )
        limit, moved = np.dot(step, step), np.dot(change, change)
        return bool(moved > FARTHER**2 * limit or min(moved, np.dot(both, both)) > FAR**2 * limit)


def sampled_elements(layout: FlatLayout) -> Array:
    """Positions in a flat buffer of at least one element of each trained parameter, spread over the parameter."""
    trained = [(e.size, at) for e, at in zip(layout.entries, layout.offsets, strict=True) if e.group is not None]
    each = max(1, SAMPLES // max(len(trained), 1))
    positions: list[int] = []
    for size, offset in trained:
        count = min(each, size)
        positions += [offset + (2 * number + 1) * size // (2 * count) for number in range(count)]
    return np.array(positions, np.intp)


class SampledWeights:
    """Implements ``WeightWatch`` for flat buffers in host memory that are the model itself, by samples of elements.

    It notices every way of writing to this memory. It does not notice changes of elements outside of the sample alone,
    nor changes that have been undone when the next step begins.

    Args:
        buffers: flat buffers that share memory with the model.
    """

    def __init__(self, buffers: Iterable[FlatBuffer]) -> None:
        self._found = False
        self._sampled = [(buffer.array, sampled_elements(buffer.layout)) for buffer in buffers]
        self._before = b""
        self._after: bytes | None = None

    @property
    def found(self) -> bool:
        return self._found

    def look(self) -> None:
        now = self._sample()
        if now != self._after and self._after is not None and not self._found:
            samples = (self._before, self._after, now)
            self._found = not self._before or is_jump(*map(self._values, samples))
        self._before = now

    def mark(self) -> None:
        self._after = self._sample()

    def forget(self) -> None:
        self._before, self._after = b"", None

    def reset(self, found: bool = False) -> None:
        self._found = found

    def _sample(self) -> bytes:
        """The sampled elements as bytes, which compare fast, and where NaN equals NaN."""
        if len(self._sampled) == 1:  # called twice in every step
            array, elements = self._sampled[0]
            return array[elements].tobytes()
        return b"".join([array[elements].tobytes() for array, elements in self._sampled])

    def _values(self, sample: bytes) -> Array:
        values, start = [], 0
        for array, elements in self._sampled:
            part = np.frombuffer(sample, array.dtype, elements.size, start)
            values.append(part.astype(np.float64))
            start += part.nbytes
        return np.concatenate(values)


class NoWatch(WeightWatch):
    """Implements ``WeightWatch`` without watching anything."""

    found = False

    def look(self) -> None:
        return

    def mark(self) -> None:
        return

    def forget(self) -> None:
        return

    def reset(self, found: bool = False) -> None:
        return
