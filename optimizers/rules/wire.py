"""Gossip in 16 bits: messages have half the bytes, and the sums over ranks are those of full precision.

A rank sends rounded values, and keeps the difference between what it had and what it has really sent. The rounding
error thus remains on the rank where it arose, as part of x, and leaves with later messages. This is error feedback
(Seide et al., INTERSPEECH 2014; Karimireddy et al., ICML 2019, arXiv 1901.09847) without a separate buffer for the
error, because push-sum keeps a share of x in any case. The sums over ranks, including the mean of all replicas, are
those of full precision. The weights w are never rounded.

The noise in single replicas: rounding changes a value by at most the fraction u of it (2^-8 in bfloat16, 2^-11 in
float16). If a rank keeps the share k, a step therefore moves its x by at most 2 (1 - k) u times the values around it,
half of it due to what the rank sends and half due to what it receives. In OSGP this is divided by a w of k while
messages are in flight: for dense graphs (small k) choose float16. The noise does not shrink as the replicas agree. It
does in algorithms that round the difference from what the neighbour already has (Choco-SGD, Koloskova et al., ICML
2019, arXiv 1902.00340; with push-sum, Taheri et al., ICML 2020, arXiv 2002.09964; compare DeepSqueeze, Tang et al.,
2019, arXiv 1907.07346). These need copies of the neighbours' models, a cost that compression to single bits justifies
and compression to 16 bits does not.
"""

from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions.reduction import quiet
from lentando.comm.transport import Array

__all__ = ["WireDtype", "check_wire_dtype", "rounded_into"]

WireDtype: TypeAlias = Literal["bfloat16", "float16"]

_LARGEST: dict[np.dtype[Any], float] = {np.dtype(bfloat16): (2 - 2**-7) * 2.0**127, np.dtype(np.float16): 65504.0}


def check_wire_dtype(name: object) -> None:
    """Refuse a dtype to which messages cannot be rounded.

    Raises:
        ConfigurationError: if ``name`` is neither None nor one of ``WireDtype``.
    """
    if name is not None and name not in get_args(WireDtype):
        legal = ", ".join(map(repr, get_args(WireDtype)))
        raise ConfigurationError(f"wire_dtype must be {legal} or None (the parameters as they are), got {name!r}")


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
