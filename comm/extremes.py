"""Minimum and maximum over ranks that are bit-identical on every rank, NaN and signed zeros included.

Backends disagree about NaN: IEEE 754 has two kinds of maximum, MPI leaves it undefined, and the result can depend on
the order in which values are combined. Integers have one order only. Floating-point values are therefore mapped to
integers in the same order, in which NaN wins and -0 is less than +0, and are reduced as such.
"""

from typing import Any

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.dtypes import is_floating
from lentando.comm.transport import Array, ReduceOp

__all__ = ["from_ordered", "needs_order", "to_ordered"]

_INTEGERS: dict[int, np.dtype[Any]] = {2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
"""Integer dtypes of the same size as floating-point numbers, by that size in bytes."""


def needs_order(array: Array, op: ReduceOp) -> bool:
    """Whether the result of a backend's own reduction could depend on how it treats NaN and signed zeros."""
    return op != "sum" and is_floating(array.dtype)


def to_ordered(array: Array, op: ReduceOp) -> Array:
    """Map floating-point numbers to integers whose minimum or maximum corresponds to theirs.

    Args:
        array: contiguous array of floating-point numbers of 16, 32 or 64 bits; not changed.
        op: ``"min"`` or ``"max"``, the operation in which NaN must win.

    Returns:
        a new array of the same shape: int32 for 16 and 32 bits (all backends support it), int64 for 64 bits.
    """
    bits = array.view(_INTEGERS[array.dtype.itemsize])
    limits = np.iinfo(bits.dtype)
    ordered = _turned(bits)
    is_nan = -np.isnan(array).astype(bits.dtype)  # all bits set, or none; only ufuncs behave equally on all devices
    ordered = (ordered & ~is_nan) | (is_nan & (limits.max if op == "max" else limits.min))
    widened: Array = ordered.astype(np.int32) if bits.dtype == np.int16 else ordered
    return widened


def from_ordered(ordered: Array, out: Array) -> None:
    """Fill ``out`` with the numbers that ``to_ordered`` has mapped to integers. NaN has the same bits on every rank."""
    values = _turned(ordered.astype(_INTEGERS[out.dtype.itemsize])).view(out.dtype)
    array_module(out).copyto(out, values)


def _turned(bits: Array) -> Array:
    """Map the bits of numbers to integers in the order of these numbers; the mapping is its own inverse.

    Negative numbers have their sign bit set and grow with their magnitude, so their other bits are inverted.
    """
    is_negative = bits >> (8 * bits.dtype.itemsize - 1)  # all bits set, or none
    turned: Array = bits ^ (is_negative & np.iinfo(bits.dtype).max)
    return turned
