"""Tensors and the elements of flat buffers: which elements belong to which tensor, and in which order."""

from collections.abc import Iterator

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatLayout
from lentando.comm.transport import Array

__all__ = ["entries_within", "in_memory_order", "in_shape"]


def entries_within(layout: FlatLayout, start: int, stop: int) -> Iterator[tuple[Entry, slice, slice]]:
    """The entries that have elements in a range of a flat buffer.

    Args:
        layout: layout of the buffer.
        start: first element of the range.
        stop: element after the last one of the range.

    Yields:
        The entry, the slice of its elements that are in the range, and their place, counted from ``start``.
    """
    for entry, offset in zip(layout.entries, layout.offsets, strict=True):
        first, last = max(offset, start), min(offset + entry.size, stop)
        if first < last:
            yield entry, slice(first - offset, last - offset), slice(first - start, last - start)


def in_shape(elements: Array, entry: Entry) -> Array:
    """All elements of an entry, in the order of the flat buffer, as an array of the entry's shape. Shares memory."""
    axes = _memory_axes(entry)
    return elements.reshape([entry.shape[axis] for axis in axes]).transpose(np.argsort(axes))


def in_memory_order(array: Array, entry: Entry) -> Array:
    """An entry's elements in the order of the flat buffer: the inverse of ``in_shape``."""
    return np.ascontiguousarray(array.transpose(_memory_axes(entry))).reshape(-1)


def _memory_axes(entry: Entry) -> list[int]:
    """The axes of a tensor in the order in which they lie in memory, outermost first."""
    axes = list(range(len(entry.shape)))
    if entry.order == "C":
        return axes
    if entry.order.startswith("channels_last"):
        return [0, *axes[2:], 1]
    raise ConfigurationError(f"{entry.name!r} has a memory order that this Lentando does not know: {entry.order!r}")
