"""Gossip in 16 bits: half of the bytes, and not a bit of the sum over ranks is lost.

What a rank sends is rounded, and what it keeps is what it had less what it has really sent. So the error of rounding
stays where it arose, as part of x, and leaves with later messages. That is error feedback (Seide et al., INTERSPEECH
2014; Karimireddy et al., ICML 2019, arXiv 1901.09847) without a buffer for the error: push-sum keeps a share of x
anyhow, and its sums over ranks, the mean of all replicas among them, are those of full precision. The weights w are
never rounded.

The noise that this leaves in single replicas: rounding changes a value by at most u of it (2^-8 in bfloat16, 2^-11 in
float16), so that a step moves x of a rank that keeps the share k by at most 2 (1 - k) u of the values around it, half
of that by what it sends and half by what it receives. OSGP divides it by a w of k while messages are under way: over
dense graphs (small k) choose float16. The noise does not shrink as replicas agree, as it does where differences to what
the neighbour already has are rounded (Choco-SGD, Koloskova et al., ICML 2019, arXiv 1902.00340; with push-sum, Taheri
et al., ICML 2020, arXiv 2002.09964; compare DeepSqueeze, Tang et al., 2019, arXiv 1907.07346). They pay for it with
copies of the neighbours' models, which single bits are worth and sixteen are not.
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
    """Refuse what messages cannot be rounded to.

    Raises:
        ConfigurationError: that names what they can.
    """
    if name is not None and name not in get_args(WireDtype):
        legal = ", ".join(map(repr, get_args(WireDtype)))
        raise ConfigurationError(f"wire_dtype must be {legal} or None (the parameters as they are), got {name!r}")


def rounded_into(out: Array, values: Array) -> Array:
    """Fill ``out``, of 16 bits, with ``values``. Returns what it holds then, in the dtype of the values.

    A value beyond the largest one of ``out`` becomes that: what is left of it is an error of rounding like any other.
    An infinity is no value: it becomes NaN, as it does in the mean of any numbers with it.
    """
    largest = _LARGEST[out.dtype]
    with quiet():
        finite = np.maximum(values, -largest)
        np.minimum(finite, largest, out=finite)
        np.add(finite, values - values, out=finite)
        array_module(out).copyto(out, finite, casting="same_kind")
    return out.astype(values.dtype)
