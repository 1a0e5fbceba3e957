"""Dtypes by name, bfloat16 included, and the dtype that sums are formed in."""

from typing import Any

import numpy as np
from ml_dtypes import bfloat16  # NumPy has no bfloat16 of its own; this is the one that TensorFlow and JAX use

from lentando.comm.errors import ConfigurationError

__all__ = ["accumulator_dtype", "bfloat16", "is_floating", "numpy_dtype"]

_HALF = (np.dtype(np.float16), np.dtype(bfloat16))


def is_floating(dtype: np.dtype[Any]) -> bool:
    """True for float16, bfloat16, float32 and float64."""
    return dtype.kind == "f" or dtype == bfloat16


def accumulator_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which values of ``dtype`` are summed and averaged: float32 at least, else the dtype itself.

    Raises:
        ConfigurationError: for a dtype that has no sum here (complex, boolean, object, ...).
    """
    if dtype in _HALF:
        return np.dtype(np.float32)
    if dtype in (np.float32, np.float64) or dtype.kind in "iu":
        return dtype
    raise ConfigurationError(f"cannot reduce arrays of {dtype}: expected floating point or integers")


def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of this name."""
    return np.dtype(bfloat16) if name == "bfloat16" else np.dtype(name)
