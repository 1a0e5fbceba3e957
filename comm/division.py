"""Division of arrays by a number."""

from math import frexp

import numpy as np

from lentando.comm.transport import Array

__all__ = ["divide"]


def divide(x: Array, divisor: float, out: Array | None = None) -> Array:
    """Return x / divisor. For a power of 2 it multiplies, which is faster and bit-identical.

    Args:
        x: array of float32 or float64.
        divisor: number, positive and finite.
        out: array like x for the result, which may be x; a new one by default.
    """
    if frexp(divisor)[0] == 0.5:
        quotient: Array = np.multiply(x, 1 / divisor, out=out)
    else:
        quotient = np.divide(x, divisor, out=out)
    return quotient
