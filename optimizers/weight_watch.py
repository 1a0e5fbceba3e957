"""Notices weights that the program sets between two steps: a rollback, loaded weights, a layer that begins again.

The anchor of an outer step and its slow momentum belong to the weights that training itself has reached. A replica asks
its framework's watch whether the program has put others in their place meanwhile.
"""

from collections.abc import Iterable
from typing import Protocol

import numpy as np

from lentando.comm.flat import FlatBuffer, FlatLayout
from lentando.comm.transport import Array

__all__ = ["NoWatch", "SampledWeights", "WeightWatch", "is_jump", "sampled_elements"]

SAMPLES = 64
"""Elements that are compared, at least one of each parameter: a microsecond per step for a hundred parameters."""

FAR, FARTHER = 1.25, 2.0
"""How many times the length of the last step a change of the program's may have and still count as part of that step.

Clipping weights, masks of pruned ones and other projections on constraints that the weights met before the step move
them at most as far as the step did; on a convex set they also end at most that far from where the step began
(projections do not expand distances). The lengths are those of a sample, so that both may appear somewhat longer, but
not both at once.
"""


class WeightWatch(Protocol):
    """Compares the weights at the beginning of a step with those at the end of the step before.

    Attributes:
        found: whether the program has set weights since ``reset``.
    """

    @property
    def found(self) -> bool:
        """See above. May wait for a device."""

    def look(self) -> None:
        """A step begins: the program has had its turn."""

    def mark(self) -> None:
        """Training has left the weights as they are now: a step has ended, or what was done between two steps."""

    def forget(self) -> None:
        """The weights, or what belongs to them, are being replaced: there is nothing to compare with until ``mark``."""

    def reset(self, found: bool = False) -> None:
        """The outer step has taken the new weights into account; or a checkpoint says that it still has to."""


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
    """Positions of elements of a flat buffer: at least one of each parameter that is trained, spread over it."""
    trained = [(e.size, at) for e, at in zip(layout.entries, layout.offsets, strict=True) if e.group is not None]
    each = max(1, SAMPLES // max(len(trained), 1))
    found: list[int] = []
    for size, offset in trained:
        count = min(each, size)
        found += [offset + (2 * number + 1) * size // (2 * count) for number in range(count)]
    return np.array(found, np.intp)


class SampledWeights:
    """Implements ``WeightWatch`` for flat buffers in host memory that are the model itself, by samples of elements.

    It sees whoever writes there, by whatever means. It does not see a change of elements outside the sample alone, nor
    changes that are no longer there when the next step begins.

    Args:
        buffers: flat buffers.
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
        """As bytes, which compare fast, and where NaN equals NaN."""
        if len(self._sampled) == 1:  # called twice in every step
            array, elements = self._sampled[0]
            return array[elements].tobytes()
        return b"".join([array[elements].tobytes() for array, elements in self._sampled])

    def _values(self, sample: bytes) -> Array:
        values, start = [], 0
        for array, elements in self._sampled:
            own = np.frombuffer(sample, array.dtype, elements.size, start)
            values.append(own.astype(np.float64))
            start += own.nbytes
        return np.concatenate(values)


class NoWatch:
    """Implements ``WeightWatch`` where nothing is looked at."""

    found = False

    def look(self) -> None:
        """Nothing to do."""

    def mark(self) -> None:
        """Nothing to do."""

    def forget(self) -> None:
        """Nothing to do."""

    def reset(self, found: bool = False) -> None:
        """Nothing to do."""
