"""Helpers for code that works on arrays in host memory (NumPy) and on a GPU (CuPy) alike.

Functions that NumPy dispatches by the type of the array (arithmetic, ``np.add(a, b, out=a)``, ``np.isfinite(a)``) are
called on ``np``. Functions that create an array or copy into one are not dispatched, or only in part, and are called on
the result of ``array_module``. Nothing here imports CuPy: code that has one of its arrays has imported it.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lentando.comm.transport import Array

__all__ = ["array_module", "copy_into", "is_on_host", "to_host"]


def is_on_host(array: Array) -> bool:
    """Whether this is a NumPy array or scalar. Any other array is on a device."""
    return isinstance(array, np.ndarray | np.generic)


def array_module(array: Array) -> Any:
    """The module whose functions apply to an array: ``numpy``, or the package that defines its type (``cupy``)."""
    return np if is_on_host(array) else sys.modules[type(array).__module__.partition(".")[0]]


def to_host(array: Array) -> NDArray[Any]:
    """The array itself, or a copy in host memory of an array on a device, which waits for the work enqueued there."""
    if is_on_host(array):
        return array
    copied: NDArray[Any] = array_module(array).asnumpy(array)
    return copied


def copy_into(out: Array, values: Array) -> None:
    """Fill ``out`` with values of the same shape and dtype. Each of the two may be on the host or on a device."""
    module = array_module(out)
    if module is not array_module(values):
        values = module.asarray(to_host(values))
    module.copyto(out, values)
