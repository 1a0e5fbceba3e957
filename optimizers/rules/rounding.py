"""Rounding of numbers to 16 bits before they are sent."""

from collections.abc import Sequence
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions.reduction import quiet
from lentando.comm.transport import Array

__all__ = ["SixteenBits", "check_sent_dtype", "rounded_into"]

SixteenBits: TypeAlias = Literal["bfloat16", "float16"]
"""Names of the dtypes to which gradients, and steps that Adasum combines, can be rounded.

Such sums are formed in the dtype that is sent. Gossip messages may have other codings: ``WireDtype`` in ``wire``.
"""

_LARGEST: dict[np.dtype[Any], float] = {np.dtype(bfloat16): (2 - 2**-7) * 2.0**127, np.dtype(np.float16): 65504.0}


def check_sent_dtype(name: object, legal: Sequence[str] = get_args(SixteenBits)) -> None:
    """Refuse a setting ``wire_dtype`` that is not possible.

    Args:
        name: value of the setting.
        legal: the names that are possible, in addition to None.

    Raises:
        ConfigurationError: if ``name`` is anything else.
    """
    if name is not None and name not in legal:
        names = ", ".join(map(repr, legal))
        raise ConfigurationError(f"wire_dtype must be {names} or None (the numbers as they are), got {name!r}")


def rounded_into(out: Array, values: Array) -> Array:
    """Fill an array of 16-bit numbers with rounded values.

    A value beyond the largest number of the 16-bit dtype becomes that number, and the difference is a rounding error
    like any other. An infinity becomes NaN, so that the receiver's values are not finite either.

    Args:
        out: array of bfloat16 or float16 that is filled.
        values: array of the same shape in float32 or float64.

    Returns:
        The content of ``out``, in the dtype of ``values``.
    """
    largest = _LARGEST[out.dtype]
    with quiet():
        finite = np.maximum(values, -largest)
        np.minimum(finite, largest, out=finite)
        np.add(finite, values - values, out=finite)
        array_module(out).copyto(out, finite, casting="same_kind")
    return out.astype(values.dtype)
