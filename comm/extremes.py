"""Minimum and maximum over ranks such that every rank ends with the same bits, NaN and signed zeros included.

Engines disagree about NaN: IEEE 754 has two kinds of maximum, MPI leaves it open, and which of two values survives can
depend on the order in which they meet. Integers have one order only. So floating-point values are reduced as integers
of that order, in which NaN comes first and -0 comes before +0.
"""

from typing import Any

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.dtypes import is_floating
from lentando.comm.transport import Array, ReduceOp

__all__ = ["from_ordered", "needs_order", "to_ordered"]

_INTEGERS: dict[int, np.dtype[Any]] = {2: np.dtype(np.int16), 4: np.dtype(np.int32), 8: np.dtype(np.int64)}
"""By the size of a floating-point number in bytes, the integers of that size."""


def needs_order(array: Array, op: ReduceOp) -> bool:
    """Whether an engine's own reduction could treat NaN in its own way."""
    return op != "sum" and is_floating(array.dtype)


def to_ordered(array: Array, op: ReduceOp) -> Array:
    """Integers whose minimum or maximum stands for that of ``array``.

    Args:
        array: floating point of 16, 32 or 64 bits, contiguous. Not changed.
        op: ``"min"`` or ``"max"``, for which NaN must win.

    Returns:
        a new array of the same shape: int32 for 16 and 32 bits (no engine lacks them), int64 for 64 bits.
    """
    bits = array.view(_INTEGERS[array.dtype.itemsize])
    limits = np.iinfo(bits.dtype)
    ordered = _turned(bits)
    is_nan = -np.isnan(array).astype(bits.dtype)  # all bits set, or none: only ufuncs work alike on every device
    ordered = (ordered & ~is_nan) | (is_nan & (limits.max if op == "max" else limits.min))
    found: Array = ordered.astype(np.int32) if bits.dtype == np.int16 else ordered
    return found


def from_ordered(ordered: Array, out: Array) -> None:
    """Fill ``out`` with the numbers that stand for integers of ``to_ordered``. NaN has the same bits on every rank."""
    values = _turned(ordered.astype(_INTEGERS[out.dtype.itemsize])).view(out.dtype)
    array_module(out).copyto(out, values)


def _turned(bits: Array) -> Array:
    """Bits of numbers as integers in the order of these numbers, and back.

    Negative numbers have their sign bit set and grow with their magnitude, so their other bits are inverted.
    """
    is_negative = bits >> (8 * bits.dtype.itemsize - 1)  # all bits set, or none
    turned: Array = bits ^ (is_negative & np.iinfo(bits.dtype).max)
    return turned
