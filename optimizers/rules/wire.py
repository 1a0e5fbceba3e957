"""How messages hold numbers: a ``Wire`` for full precision, one for 16 bits, and one for integers of 8 or 4 bits.

The messages are those of gossip, of averages of gradients in 8 or 4 bits, and of outer steps. What follows is about
gossip.

Another coding of messages is another ``Wire``, with its name in ``WireDtype`` and ``_WIRES``. Push-sum and the
exchanges of its messages work with any that keeps the promise stated in ``Wire``.

In 16 bits, messages have half the bytes; in 8 bits, a quarter (``lentando.optimizers.rules.block_scaling``). The sums
over ranks are those of full precision. A rank sends rounded
values, and keeps the difference between what it had and what it has really sent. The rounding error thus remains on the
rank where it arose, as part of x, and leaves with later messages. This is error feedback (Seide et al., INTERSPEECH
2014; Karimireddy et al., ICML 2019, arXiv 1901.09847) without a separate buffer for the error, because push-sum keeps a
share of x in any case. The sums over ranks, including the mean of all replicas, are those of full precision. The
weights w are never rounded.

The noise in single replicas: rounding changes a value by at most the fraction u of it (2^-8 in bfloat16, 2^-11 in
float16). If a rank keeps the share k, a step therefore moves its x by at most 2 (1 - k) u times the values around it,
half of it due to what the rank sends and half due to what it receives. In OSGP this is divided by a w of k while
messages are in flight: for dense graphs (small k) choose float16. The noise does not shrink as the replicas agree. It
does in algorithms that round the difference from what the neighbour already has (Choco-SGD, Koloskova et al., ICML
2019, arXiv 1902.00340; with push-sum, Taheri et al., ICML 2020, arXiv 2002.09964; compare DeepSqueeze, Tang et al.,
2019, arXiv 1907.07346). These need copies of the neighbours' models, a cost that compression to single bits justifies
and compression to 16 bits does not. With int8, u is 1/254 of the largest value of the block, and with int4 it is 1/14,
which is too much for most models: gossip sends parameters, whose noise remains, while outer steps send movements.
"""

from collections.abc import Mapping
from typing import Any, Literal, Protocol, TypeAlias, get_args

import numpy as np

from lentando.comm.array_module import copy_into
from lentando.comm.dtypes import bfloat16
from lentando.comm.transport import Array
from lentando.optimizers.rules.block_scaling import BlockScaled
from lentando.optimizers.rules.rounding import check_sent_dtype, rounded_into

__all__ = ["SentShare", "Wire", "WireDtype", "check_wire_dtype", "wire_of"]

WireDtype: TypeAlias = Literal["bfloat16", "float16", "int8", "int4"]
"""Names of the wires other than full precision. A name that is added here needs its wire in ``_WIRES``."""


class SentShare(Protocol):
    """A share of one buffer, coded in memory of a message. Elements are written and read block by block.

    The blocks are those of ``lentando.comm.flat.blocks``; ``slice(None)`` stands for the whole buffer.
    """

    def write(self, elements: slice, x: Array, share: float) -> Array:
        """Code a share of some elements.

        Args:
            elements: range of the buffer.
            x: these elements of the buffer.
            share: factor by which they are multiplied.

        Returns:
            What receivers will read, in the dtype of the buffer. Valid until the next call.
        """

    def read(self, elements: slice) -> Array:
        """Decode some elements, in the dtype of the buffer. The result may be a view of the message.

        Args:
            elements: range of the buffer.
        """

    def restore(self, values: Array) -> None:
        """Code all elements again, so that ``read`` returns values that it has returned before a checkpoint.

        Args:
            values: all elements, in the dtype of the buffer.
        """


class Wire(Protocol):
    """A coding of messages.

    Receivers must read every element of a share with an error that is small compared with the element, or at least with
    the largest elements near it in the buffer. What is not sent stays with the sender, so that the sums over ranks are
    exact with any coding, but the weight w is halved (or divided otherwise) all the same. An element that a message
    leaves out is therefore too large afterwards at the sender, by the factor 1 / share, and too small at the receiver.
    A coding that sends a few elements only (top-k) drives the replicas apart in this way. It needs copies of the
    neighbours' parameters, from which only differences are sent: a base algorithm of its own, such as Choco-SGD.

    Attributes:
        is_exact: whether receivers read exactly the shares that were written. Otherwise the sender keeps the difference
            to what they read.
    """

    is_exact: bool

    def size_bytes(self, x: Array) -> int:
        """Bytes of a share of a buffer, a multiple of ``alignment_bytes``.

        Args:
            x: buffer, a one-dimensional array of float32 or float64.
        """

    def alignment_bytes(self, x: Array) -> int:
        """Number of bytes, a power of 2 up to 8, of which the share's place in a message must be a multiple."""

    def share_in(self, memory: Array, x: Array) -> SentShare:
        """The share of a buffer in memory of a message.

        Args:
            memory: ``size_bytes(x)`` bytes, an array of uint8 in the memory (host or device) of the buffer.
            x: the buffer. Only its size and dtype are used.
        """


def wire_of(name: WireDtype | None) -> Wire:
    """The wire of a setting ``wire_dtype``: full precision for None."""
    return _WIRES[name]


def check_wire_dtype(name: object) -> None:
    """Refuse what is not the name of a wire.

    Raises:
        ConfigurationError: if ``name`` is neither None nor one of ``WireDtype``.
    """
    check_sent_dtype(name, get_args(WireDtype))


class _FullPrecision:
    """Sends shares in the dtype of x."""

    is_exact = True

    def size_bytes(self, x: Array) -> int:
        return int(x.nbytes)

    def alignment_bytes(self, x: Array) -> int:
        return int(x.dtype.itemsize)

    def share_in(self, memory: Array, x: Array) -> SentShare:
        return _ExactShare(memory.view(x.dtype))


class _ExactShare:
    def __init__(self, values: Array) -> None:
        self._values = values

    def write(self, elements: slice, x: Array, share: float) -> Array:
        written: Array = np.multiply(x, share, out=self._values[elements])
        return written

    def read(self, elements: slice) -> Array:
        return self._values[elements]

    def restore(self, values: Array) -> None:
        copy_into(self._values, values)


class _SixteenBits:
    """Rounds shares to a 16-bit dtype.

    Args:
        dtype: bfloat16 or float16.
    """

    is_exact = False

    def __init__(self, dtype: Any) -> None:
        self._dtype: np.dtype[Any] = np.dtype(dtype)

    def size_bytes(self, x: Array) -> int:
        return 2 * int(x.size)

    def alignment_bytes(self, x: Array) -> int:
        return 2

    def share_in(self, memory: Array, x: Array) -> SentShare:
        return _RoundedShare(memory.view(self._dtype), x.dtype)


class _RoundedShare:
    def __init__(self, rounded: Array, dtype: np.dtype[Any]) -> None:
        self._rounded = rounded
        self._dtype = dtype

    def write(self, elements: slice, x: Array, share: float) -> Array:
        return rounded_into(self._rounded[elements], x * share)

    def read(self, elements: slice) -> Array:
        return self._rounded[elements].astype(self._dtype)

    def restore(self, values: Array) -> None:
        copy_into(self._rounded, values)  # values that were rounded once are not rounded again


_WIRES: Mapping[WireDtype | None, Wire] = {
    None: _FullPrecision(),
    "bfloat16": _SixteenBits(bfloat16),
    "float16": _SixteenBits(np.float16),
    "int8": BlockScaled(8),
    "int4": BlockScaled(4),
}
