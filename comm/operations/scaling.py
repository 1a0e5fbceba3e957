"""Factors by which arrays are multiplied before and after they are combined."""

from numbers import Real
from typing import Any

import numpy as np

from lentando.comm.dtypes import accumulator_dtype, is_floating
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array

__all__ = ["check_factors", "factors_in_words", "scale"]


def check_factors(dtype: np.dtype[Any], **factors: Any) -> None:
    """Check factors, which are 1 for arrays that cannot be multiplied.

    Args:
        dtype: dtype of the array.
        factors: the factors, by the names of the arguments.

    Raises:
        ConfigurationError: if one is not a number, or has no meaning for the dtype.
    """
    for name, factor in factors.items():
        if not isinstance(factor, Real) or isinstance(factor, bool):
            raise ConfigurationError(f"{name} must be a number, got {factor!r}")
        if factor != 1 and dtype == np.bool_:
            raise ConfigurationError(f"{name} has no meaning for an array of bool: expected 1, got {factor!r}")


def factors_in_words(prescale_factor: float, postscale_factor: float) -> list[str]:
    """The factors as an argument that is compared between ranks; none if both are 1."""
    if (prescale_factor, postscale_factor) == (1.0, 1.0):
        return []
    return [f"scaled by {prescale_factor!r} before and {postscale_factor!r} after"]


def scale(array: Array, factor: float) -> None:
    """Multiply an array in place.

    float16 and bfloat16 are multiplied in float32, float32 and float64 in their own dtype. Integers are multiplied in
    float64, and the product is rounded towards zero, as Horovod does it.

    Args:
        array: contiguous array of floating-point, complex or integer numbers.
        factor: the factor; 1 leaves the array unchanged.

    Example:
        >>> array = np.array([-3, 3, 10])
        >>> scale(array, 0.5)
        >>> array.tolist()
        [-1, 1, 5]
    """
    if factor == 1 or array.size == 0:
        return
    with np.errstate(over="ignore", invalid="ignore", under="ignore"):
        if array.dtype.kind == "c":
            array *= array.real.dtype.type(factor)
        elif is_floating(array.dtype):
            wide = accumulator_dtype(array.dtype)
            if wide == array.dtype:
                np.multiply(array, wide.type(factor), out=array)
            else:
                array[...] = (array.astype(wide) * wide.type(factor)).astype(array.dtype)
        else:
            array[...] = np.trunc(array.astype(np.float64) * float(factor)).astype(array.dtype)
