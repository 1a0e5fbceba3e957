"""One source for arrays in host memory (NumPy) and on a GPU (CuPy): the numerics find their module from the array.

What NumPy dispatches by the array's type (arithmetic, ``np.add(a, b, out=a)``, ``np.isfinite(a)``) is written with
``np``. What makes an array, or copies into one, is not dispatched, or only in part, and asks ``array_module`` first.
Nothing here imports CuPy: whoever has an array of its has imported it.
"""

import sys
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lentando.comm.transport import Array

__all__ = ["array_module", "copy_into", "is_on_host", "to_host"]


def is_on_host(array: Array) -> bool:
    """Whether this is a NumPy array, or a NumPy scalar; any other lies on a device."""
    return isinstance(array, np.ndarray | np.generic)


def array_module(array: Array) -> Any:
    """``numpy``, or the package that the array's type comes from (``cupy``), which has NumPy's functions."""
    return np if is_on_host(array) else sys.modules[type(array).__module__.partition(".")[0]]


def to_host(array: Array) -> NDArray[Any]:
    """The array itself, or a copy of a device's. That waits for all that the device has to do before."""
    if is_on_host(array):
        return array
    copied: NDArray[Any] = array_module(array).asnumpy(array)
    return copied


def copy_into(out: Array, values: Array) -> None:
    """Fill ``out`` with values of its shape and dtype, wherever each of them lies."""
    module = array_module(out)
    if module is not array_module(values):
        values = module.asarray(to_host(values))
    module.copyto(out, values)
