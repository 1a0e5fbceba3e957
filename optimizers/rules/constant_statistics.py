"""Constant statistics that are not finite, such as a causal mask of -inf, and do not mean that training has diverged.

A model's buffers are averaged with its parameters. Some of them never change, are equal on all ranks, and hold an
infinity, NaN, or a number so large that the sum over the ranks overflows: masks, and the ranges of observers that have
not seen data. Their average would be refused, or wrong, and is not needed.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.flat import Entry, FlatBuffer, all_finite
from lentando.comm.transport import Array

__all__ = ["Constant", "Constants", "is_finite_but_for"]


@dataclass(frozen=True)
class Constant:
    """Elements of one statistic that keep their values on this rank.

    Attributes:
        part: range of the statistic, or of a part of it, in an array of elements of the flat buffer.
        where: boolean array that is True at the constant elements of that range.
        values: values of all elements of that range.
    """

    part: slice
    where: Array
    values: Array

    def restore(self, mean: Array) -> None:
        """Put the values back into an average of that array, where the average is not finite."""
        part = mean[self.part]
        array_module(mean).copyto(part, self.values, where=self.where & ~np.isfinite(part))


class Constants:
    """Elements of statistics whose average over the ranks is not finite although nothing has diverged.

    They are found when all ranks hold the same model, so that all ranks find the same elements. From then on an element
    is a constant for as long as this rank's value is the same. If its average is not finite, the rank that forms the
    average, whose result all ranks get, puts the constant back. This needs no communication, and no work for models
    without such elements.

    Args:
        size: number of ranks over which sums are formed.

    Attributes:
        exist: whether the model has had any when training began; usually it has none.
    """

    def __init__(self, size: int) -> None:
        self.exist = False
        self._size = size
        self._known: dict[str, tuple[Array, Array]] = {}

    def note(self, buffers: Iterable[FlatBuffer]) -> None:
        """Find the constants in buffers with the model at the start of training, in one pass over the statistics."""
        self._known = {}
        for buffer in buffers:
            start = buffer.parameters.size
            if start == buffer.array.size:
                continue
            wide = accumulator_dtype(buffer.array.dtype)
            for entry, offset in zip(buffer.layout.entries, buffer.layout.offsets, strict=True):
                if entry.group is not None:
                    continue
                values = buffer.array[offset : offset + entry.size]
                with np.errstate(over="ignore", invalid="ignore"):
                    where = ~np.isfinite(values.astype(wide) * self._size)
                if bool(where.any()):
                    self._known[entry.name] = where, values.copy()
        self.exist = bool(self._known)

    def within(self, buffer: FlatBuffer, elements: slice | None = None) -> list[Constant]:
        """The constants that a buffer still holds.

        Args:
            buffer: flat buffer to search.
            elements: range of the buffer to search, from which the places of constants are counted; None for all.
        """
        found: list[Constant] = []
        if not self._known:
            return found
        first, last = (0, buffer.array.size) if elements is None else (elements.start, elements.stop)
        for entry, offset in zip(buffer.layout.entries, buffer.layout.offsets, strict=True):
            start, stop = max(offset, first), min(offset + entry.size, last)
            known = self._known.get(entry.name)
            if known is None or start >= stop or known[0].size != entry.size:  # it may have been resized since
                continue
            where, values = (array[start - offset : stop - offset] for array in known)
            own = buffer.array[start:stop]
            unchanged = where & ((own == values) | (np.isnan(own) & np.isnan(values)))
            found.append(Constant(slice(start - first, stop - first), unchanged, values))
        return found

    def first_non_finite(self, buffers: Sequence[FlatBuffer]) -> Entry | None:
        """The first entry with a NaN or an infinity that is not a constant, or None."""
        for buffer in buffers:
            constants = self.within(buffer)
            if not is_finite_but_for(buffer.array, constants):
                bad = ~np.isfinite(buffer.array)
                for constant in constants:
                    bad[constant.part] &= ~constant.where
                return buffer.layout.entry_at(int(bad.argmax()))
        return None


def is_finite_but_for(array: Array, constants: Sequence[Constant]) -> bool:
    """Whether all elements except constants are finite, in one pass over memory.

    Args:
        array: one-dimensional array.
        constants: constants of the array, in the order of their places.
    """
    start = 0
    for constant in constants:
        if not all_finite(array[start : constant.part.start]):
            return False
        if not bool((np.isfinite(array[constant.part]) | constant.where).all()):
            return False
        start = constant.part.stop
    return all_finite(array[start:])
