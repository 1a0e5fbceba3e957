"""Tensors and the elements of flat buffers: which elements are whose, and in which order they lie."""

from collections.abc import Iterator

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import Entry, FlatLayout
from lentando.comm.transport import Array

__all__ = ["entries_within", "in_memory_order", "in_shape"]


def entries_within(layout: FlatLayout, start: int, stop: int) -> Iterator[tuple[Entry, slice, slice]]:
    """The entries that have elements in a range of a buffer.

    Yields:
        The entry, which of its elements these are, and where they lie counted from ``start``.
    """
    for entry, offset in zip(layout.entries, layout.offsets, strict=True):
        first, last = max(offset, start), min(offset + entry.size, stop)
        if first < last:
            yield entry, slice(first - offset, last - offset), slice(first - start, last - start)


def in_shape(elements: Array, entry: Entry) -> Array:
    """All elements of an entry, as they lie in a flat buffer, as an array of its shape. Shares memory."""
    axes = _memory_axes(entry)
    return elements.reshape([entry.shape[axis] for axis in axes]).transpose(np.argsort(axes))


def in_memory_order(array: Array, entry: Entry) -> Array:
    """The inverse of ``in_shape``."""
    return np.ascontiguousarray(array.transpose(_memory_axes(entry))).reshape(-1)


def _memory_axes(entry: Entry) -> list[int]:
    """The axes of a tensor in the order in which they lie in memory, outermost first."""
    axes = list(range(len(entry.shape)))
    if entry.order == "C":
        return axes
    if entry.order.startswith("channels_last"):
        return [0, *axes[2:], 1]
    raise ConfigurationError(f"{entry.name!r} lies in an order of memory that is not known here: {entry.order!r}")
