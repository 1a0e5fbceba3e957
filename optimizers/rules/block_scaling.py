"""Quantization in blocks: integers of 8 or 4 bits, and one scale for each block of 256 elements.

An element v of a block is sent as the integer q, nearest to v / s, where s is the block's scale. Receivers read q s:

    s = trunc17(max |v| / L),   q = round(v / s),   L = 127 (int8) or 7 (int4)

with the maximum over the block. trunc17 keeps 17 significant bits of the scale, so that q s is exact in float32. It
follows that a value that receivers read differs from v by s / 2 at most (about 0.4 % of the largest element of the
block for int8, 7 % for int4), that rounding what was read once more changes nothing, and that no sum of rounding errors
hides in the arithmetic. Rounding is to the nearest and deterministic, so that runs can be repeated bit by bit.

Each block takes 256 or 128 bytes, and 4 bytes for its scale (8 for elements of float64): 8.125 or 4.125 bits per
element of float32. Blocks with their own scales are those of QSGD's buckets (Alistarh et al., NeurIPS 2017, arXiv
1610.02132) and of 8-bit optimizers (Dettmers et al., ICLR 2022, arXiv 2110.02861); Streaming DiLoCo (Douillard et al.,
arXiv 2501.18512) sends outer gradients in 4 bits with a sign and three exponent bits, and no error feedback.

A block with a NaN or an infinity is read as NaN throughout. A block whose largest element is below 127 (or 7) times the
smallest normal number is read as zeros.
"""

from typing import Any

import numpy as np

from lentando.comm.array_module import array_module, copy_into, is_on_host
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions.reduction import quiet
from lentando.comm.transport import Array

__all__ = ["BLOCK_ELEMENTS", "BlockScaled"]

BLOCK_ELEMENTS = 256
"""Elements that share a scale. ``lentando.comm.flat.BLOCK`` is a multiple of it."""
SCALE_BITS = 17
"""Significant bits of a scale: with the 7 bits of the integers, a product has 24, as many as float32."""


class BlockScaled:
    """Codes shares as integers with a scale for each block: a ``Wire``.

    Args:
        bits: bits of an integer, 8 or 4.

    Example:
        >>> from lentando.optimizers.rules.wire import wire_of
        >>> x = np.array([127.0, -3.4, 0.6, 0.0], np.float32)
        >>> wire = wire_of("int8")
        >>> message = np.zeros(wire.size_bytes(x), np.uint8)
        >>> wire.share_in(message, x).write(slice(0, 4), x, 1.0).tolist()
        [127.0, -3.0, 1.0, 0.0]
        >>> message.size, x.nbytes
        (8, 16)
    """

    is_exact = False

    def __init__(self, bits: int) -> None:
        self._bits = bits

    def size_bytes(self, x: Array) -> int:
        size = _blocks_of(x.size) * x.dtype.itemsize + _bytes_of(x.size, self._bits)
        return -(-size // x.dtype.itemsize) * x.dtype.itemsize

    def alignment_bytes(self, x: Array) -> int:
        return int(x.dtype.itemsize)

    def share_in(self, memory: Array, x: Array) -> "_ScaledShare":
        if not is_on_host(memory):
            raise ConfigurationError("wire_dtype='int8' and 'int4' need the parameters in host memory: use 'bfloat16'")
        return _ScaledShare(memory, x.size, x.dtype, self._bits)


class _ScaledShare:
    """A share in memory of a message: all scales, then all integers.

    Args:
        memory: bytes of the message.
        size: number of elements.
        dtype: dtype of the elements.
        bits: bits of an integer.
    """

    def __init__(self, memory: Array, size: int, dtype: np.dtype[Any], bits: int) -> None:
        count = _blocks_of(size)
        self._scales = memory[: count * dtype.itemsize].view(dtype)
        self._integers = memory[count * dtype.itemsize :][: _bytes_of(size, bits)]
        self._size, self._dtype, self._bits = size, dtype, bits
        self._module = array_module(memory)

    def write(self, elements: slice, x: Array, share: float) -> Array:
        values: Array = x if share == 1 else x * share
        sent: Array = self._module.empty(values.size, self._dtype)
        with quiet():
            for part, scales, integers in self._rows(elements):
                self._quantize(_rows_of(values[part]), scales, integers, _rows_of(sent[part]))
        return sent

    def read(self, elements: slice) -> Array:
        size = len(range(*elements.indices(self._size)))
        values: Array = self._module.empty(size, self._dtype)
        with quiet():
            for part, scales, integers in self._rows(elements):
                self._restore_rows(_rows_of(values[part]), scales, integers)
        return values

    def restore(self, values: Array) -> None:
        own: Array = self._module.empty(self._size, self._dtype)
        copy_into(own, values)
        self.write(slice(None), own, 1.0)  # what was read from a block is what its integers stand for

    def _rows(self, elements: slice) -> list[tuple[slice, Array, Array]]:
        """The whole blocks of a range, and the shorter one at the end of the buffer, counted from the range's start.

        With each come its scales, and its integers with a row for each block.
        """
        start, stop, _ = elements.indices(self._size)
        first, whole = start // BLOCK_ELEMENTS, (stop - start) // BLOCK_ELEMENTS
        parts = []
        if whole:
            middle = _bytes_of((first + whole) * BLOCK_ELEMENTS, self._bits)
            integers = self._integers[_bytes_of(start, self._bits) : middle]
            parts.append((slice(0, whole * BLOCK_ELEMENTS), first, whole, integers))
        if rest := stop - start - whole * BLOCK_ELEMENTS:
            integers = self._integers[_bytes_of(stop - rest, self._bits) :]
            parts.append((slice(whole * BLOCK_ELEMENTS, stop - start), first + whole, 1, integers))
        return [
            (part, self._scales[block : block + count], integers.reshape(count, -1))
            for part, block, count, integers in parts
        ]

    def _quantize(self, rows: Array, scales: Array, integers: Array, sent: Array) -> None:
        """Fill scales and integers, and what receivers read."""
        levels = 2 ** (self._bits - 1) - 1
        largest = np.maximum(rows.max(axis=1), -rows.min(axis=1))
        mantissas, exponents = np.frexp(largest / levels)
        scale = np.ldexp(np.trunc(mantissas * 2**SCALE_BITS) / 2**SCALE_BITS, exponents).astype(self._dtype, copy=False)
        scale[scale < np.finfo(self._dtype).tiny] = 0
        scale += scale - scale  # infinity becomes NaN, as every element of that block
        scales[...] = scale
        np.multiply(rows, (1 / (scale + (scale == 0)))[:, None], out=sent)
        np.rint(sent, out=sent)
        if self._bits == 8:
            integers.view(np.int8)[...] = sent.astype(np.int8)
        else:
            whole = (sent + 8).astype(np.uint8)
            half = integers.shape[1]
            integers[...] = whole[:, :half]
            integers[:, : rows.shape[1] - half] |= whole[:, half:] << 4
        np.multiply(sent, scale[:, None], out=sent)

    def _restore_rows(self, out: Array, scales: Array, integers: Array) -> None:
        if self._bits == 8:
            out[...] = integers.view(np.int8)
        else:
            half = integers.shape[1]
            out[:, :half] = integers & 15
            out[:, half:] = integers[:, : out.shape[1] - half] >> 4
            out -= 8
        np.multiply(out, scales[:, None], out=out)


def _rows_of(values: Array) -> Array:
    """A row for each block; a shorter one is alone."""
    return values.reshape(-1, min(values.size, BLOCK_ELEMENTS))


def _blocks_of(size: int) -> int:
    return -(-size // BLOCK_ELEMENTS)


def _bytes_of(size: int, bits: int) -> int:
    """Bytes of integers; a block of an odd number of elements has half a byte more."""
    return size if bits == 8 else size // BLOCK_ELEMENTS * (BLOCK_ELEMENTS // 2) + (size % BLOCK_ELEMENTS + 1) // 2
