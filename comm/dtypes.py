"""Dtypes by name, including bfloat16, and the dtypes in which sums are formed."""

from functools import cache
from typing import Any

import numpy as np
from ml_dtypes import bfloat16  # NumPy has no bfloat16 of its own; this is the one that TensorFlow and JAX use

from lentando.comm.errors import ConfigurationError

__all__ = ["accumulator_dtype", "bfloat16", "is_floating", "numpy_dtype"]

_HALF = (np.dtype(np.float16), np.dtype(bfloat16))


@cache
def is_floating(dtype: np.dtype[Any]) -> bool:
    """Whether a dtype is floating point: float16, bfloat16, float32 or float64."""
    return dtype.kind == "f" or dtype == bfloat16


@cache
def accumulator_dtype(dtype: np.dtype[Any]) -> np.dtype[Any]:
    """The dtype in which values of ``dtype`` are summed and averaged: the dtype itself, and float32 for half precision.

    Raises:
        ConfigurationError: for a dtype that cannot be reduced (complex, boolean, object, ...).
    """
    if dtype in _HALF:
        return np.dtype(np.float32)
    if dtype in (np.float32, np.float64) or dtype.kind in "iu":
        return dtype
    raise ConfigurationError(f"cannot reduce arrays of {dtype}: expected floating point or integers")


@cache
def numpy_dtype(name: str) -> np.dtype[Any]:
    """The dtype of this name, which may be bfloat16."""
    return np.dtype(bfloat16) if name == "bfloat16" else np.dtype(name)
