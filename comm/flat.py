"""Flat buffers: all parameters of one dtype in one contiguous array, in a fixed order.

Averaging one long vector takes one message where averaging a hundred tensors takes a hundred. The frameworks' tensors
are views of the buffer, or are copied to and from it.
"""

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import inf, isfinite, prod
from typing import Any

import numpy as np

from lentando.comm.array_module import is_on_host
from lentando.comm.dtypes import numpy_dtype
from lentando.comm.errors import ConfigurationError, grouped_by_rank
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array

__all__ = [
    "Entry",
    "FlatBuffer",
    "FlatLayout",
    "Range",
    "all_finite",
    "all_moderate",
    "blocks",
    "build_layouts",
    "describe",
    "first_difference",
    "in_words",
]

BLOCK = 64 * 1024
"""Elements of a block: 256 KiB of float32. With shorter blocks, more calls cost more than better caching saves."""
ROW = 8 * 1024
"""Elements whose squares are summed by one call of BLAS, which would start threads for many more."""
MODERATE = 2.0**63
"""Numbers below it are moderate, where their squares are not summed."""


@dataclass(frozen=True)
class Entry:
    """One tensor of the model.

    Attributes:
        name: unique name, for error messages and checkpoints.
        shape: shape of the tensor.
        dtype: name of the dtype, such as ``"float32"``.
        group: number of the parameter group, which has one learning rate; None for a statistic (such as BatchNorm's
            running mean), which is averaged but not trained.
        order: memory order of the elements, for frameworks in which it varies; "C" is row by row.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    group: int | None
    order: str = "C"

    @property
    def size(self) -> int:
        """Number of elements of the tensor."""
        return prod(self.shape)


@dataclass(frozen=True)
class Range:
    """Consecutive elements that share a parameter group."""

    start: int
    stop: int
    group: int | None


class FlatLayout:
    """The positions of tensors of one dtype in a one-dimensional buffer.

    Args:
        entries: tensors of one dtype, with unique names, in the order of their positions.

    Attributes:
        entries: the tensors, in this order.
        offsets: index of the first element of each entry.
        size: total number of elements.
        dtype: dtype of the buffer.
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)
        dtypes = {entry.dtype for entry in self.entries}
        if len(dtypes) != 1:
            raise ConfigurationError(f"a flat buffer holds one dtype, got {sorted(dtypes)}")
        names = [entry.name for entry in self.entries]
        if len(set(names)) != len(names):
            twice = sorted({name for name in names if names.count(name) > 1})
            raise ConfigurationError(f"names of parameters must be unique, got {twice} more than once")
        self.dtype = numpy_dtype(dtypes.pop())
        self.offsets: list[int] = []
        self.size = 0
        for entry in self.entries:
            self.offsets.append(self.size)
            self.size += entry.size

    @cached_property
    def ranges(self) -> list[Range]:
        """Ranges of the buffer, cut where the parameter group changes."""
        ranges: list[Range] = []
        for entry, offset in zip(self.entries, self.offsets, strict=True):
            if ranges and ranges[-1].group == entry.group:
                ranges[-1] = Range(ranges[-1].start, offset + entry.size, entry.group)
            else:
                ranges.append(Range(offset, offset + entry.size, entry.group))
        return ranges

    def ranges_within(self, part: slice) -> list[Range]:
        """The parts of ``ranges`` that lie in a part of the buffer, counted from its start."""
        start, stop = part.start, part.stop
        cut = [Range(max(r.start, start) - start, min(r.stop, stop) - start, r.group) for r in self.ranges]
        return [r for r in cut if r.start < r.stop]

    def entry_at(self, index: int) -> Entry:
        """The entry that element ``index`` belongs to."""
        if not 0 <= index < self.size:
            raise IndexError(f"element {index} of a buffer of {self.size}")
        # The last entry that starts there: empty ones before it start at the same offset.
        return self.entries[bisect_right(self.offsets, index) - 1]

    def view(self, buffer: Array, number: int) -> Array:
        """Entry ``number`` of a buffer in this layout, in its own shape, sharing memory."""
        entry, start = self.entries[number], self.offsets[number]
        return buffer[start : start + entry.size].reshape(entry.shape)


class FlatBuffer:
    """A layout together with its memory.

    Args:
        layout: positions of the entries.
        array: one-dimensional array of the layout's size and dtype; a new one of zeros by default.
        shared: whether other ranks of this node can access the new memory, if the system supports it.

    Example:
        >>> (layout,) = build_layouts([Entry("w", (2, 2), "float32", 0), Entry("b", (2,), "float32", 0)])
        >>> buffer = FlatBuffer(layout)
        >>> weights, bias = buffer.views
        >>> bias[:] = 1
        >>> buffer.array.tolist()
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0]
    """

    def __init__(self, layout: FlatLayout, array: Array | None = None, *, shared: bool = False) -> None:
        if array is None:
            array = (shared_zeros if shared else np.zeros)(layout.size, layout.dtype)
        if array.shape != (layout.size,) or array.dtype != layout.dtype or not array.flags.c_contiguous:
            raise ConfigurationError(
                f"a buffer for this layout is {layout.size} contiguous elements of {layout.dtype}, "
                f"got shape {array.shape} of {array.dtype}"
            )
        self.layout = layout
        self.array = array

    @cached_property
    def views(self) -> list[Array]:
        """Each entry in its own shape, sharing memory."""
        return [self.layout.view(self.array, number) for number in range(len(self.layout.entries))]

    @property
    def by_name(self) -> dict[str, Array]:
        """The ``views`` by the names of their entries."""
        return {entry.name: view for entry, view in zip(self.layout.entries, self.views, strict=True)}

    @cached_property
    def parameters(self) -> Array:
        """The trained part of the buffer: all but the statistics, which are at the end."""
        stop = max((part.stop for part in self.layout.ranges if part.group is not None), default=0)
        if any(part.group is None and part.start < stop for part in self.layout.ranges):
            raise ConfigurationError("the statistics of a flat buffer must come after its parameters")
        return self.array[:stop]

    def first_non_finite(self) -> str | None:
        """Name of the first entry that contains a NaN or an infinity, or None."""
        if all_finite(self.array):
            return None
        is_bad = ~np.isfinite(self.array)
        return self.layout.entry_at(int(is_bad.argmax())).name if is_bad.any() else None


def blocks(array: Array) -> Iterator[slice]:
    """Cut a buffer into ranges that stay in the cache while several passes are made over each.

    On a device the buffer is one range: there, each pass over each block would be a separate kernel.
    """
    block = BLOCK if is_on_host(array) else max(array.size, 1)
    for start in range(0, array.size, block):
        yield slice(start, start + block)


def all_finite(array: Array) -> bool:
    """Whether all elements are finite, in one pass over memory."""
    if not is_on_host(array):
        # A sum is not finite if any of its terms is not. It can also overflow; only then every element is checked.
        return bool(np.isfinite(array.sum())) or bool(np.isfinite(array).all())
    if array.dtype.itemsize == 2:
        return _all_below(inf, array)
    with np.errstate(over="ignore", invalid="ignore"):  # both extremes are NaN if an element is
        return all(
            _has_finite_squares(array[block]) or (isfinite(array[block].min()) and isfinite(array[block].max()))
            for block in blocks(array)
        )


def all_moderate(array: Array) -> bool:
    """Whether all elements are finite, and so small that a sum of them over any number of ranks is finite.

    True if all are 1e17 or smaller; False means only that such a sum may not be finite. Takes one pass over memory.

    Args:
        array: one-dimensional array of floating-point numbers in host memory.
    """
    if array.dtype.itemsize == 2:
        return _all_below(inf if array.dtype == np.float16 else MODERATE, array)  # sums are formed in float32
    with np.errstate(over="ignore", invalid="ignore"):
        return _has_finite_squares(array)


def _all_below(limit: float, array: Array) -> bool:
    """Whether no element of 16 bits reaches the limit. Compares bits: NumPy would convert the elements one by one."""
    bits = np.array(limit, array.dtype).view(np.uint16)
    return all(int((array[block].view(np.uint16) & 0x7FFF).max()) < bits for block in blocks(array))


def _has_finite_squares(array: Array) -> bool:
    """Whether the sum of the squares is finite, which takes half the time of both extremes."""
    in_rows = array.size - array.size % ROW
    rows, rest = array[:in_rows].reshape(-1, 1, ROW), array[in_rows:]
    return isfinite(np.dot(rest, rest)) and bool(np.isfinite(np.matmul(rows, rows.swapaxes(1, 2))).all())


def build_layouts(entries: Iterable[Entry]) -> list[FlatLayout]:
    """One layout per dtype, in the order of their first entries. Entries of one dtype keep their order."""
    by_dtype: dict[str, list[Entry]] = {}
    for entry in entries:
        by_dtype.setdefault(entry.dtype, []).append(entry)
    return [FlatLayout(same) for same in by_dtype.values()]


def describe(layouts: Iterable[FlatLayout]) -> list[list[Any]]:
    """The entries as JSON, to be compared between ranks."""
    return [[e.name, list(e.shape), e.dtype, e.group, e.order] for layout in layouts for e in layout.entries]


def first_difference(by_rank: Sequence[Sequence[Sequence[Any]]]) -> str:
    """Describe the first difference between the results of ``describe`` on all ranks, by rank."""
    for number in range(max(map(len, by_rank))):
        rows = [in_words(entries, number) for entries in by_rank]
        if len(set(rows)) > 1:
            counts = sorted({len(entries) for entries in by_rank})
            lengths = f", of {' or '.join(map(str, counts))} in all" if len(counts) > 1 else ""
            return f"tensor number {number}{lengths}: {grouped_by_rank(rows)}"
    return "none"


def in_words(entries: Sequence[Sequence[Any]], number: int) -> str:
    """Describe one of the entries that ``describe`` returns, for a message."""
    if number >= len(entries):
        return "nothing"
    name, shape, dtype, group, order = entries[number]
    about_group = "" if group is None else f", parameter group {group}"
    about_order = "" if order == "C" else f", memory order {order}"
    return f"{name!r} of shape {shape}, {dtype}{about_group}{about_order}"
