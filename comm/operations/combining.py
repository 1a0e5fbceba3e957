"""How an array is combined over ranks by each op."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np

from lentando.comm.collectives import all_reduce
from lentando.comm.dtypes import accumulator_dtype, is_floating
from lentando.comm.operations.adasum import adasum
from lentando.comm.operations.op import Adasum, Average, Min, Op, Product, Sum
from lentando.comm.operations.scaling import scale
from lentando.comm.summation import Summation
from lentando.comm.transport import Array, Transport

__all__ = ["as_numbers", "combine", "combine_gathered", "combine_parts", "summation_of"]

PIECE_BYTES = 1 << 20
"""Bytes of each rank that are gathered at once to combine them here."""


def as_numbers(array: Array) -> Array:
    """The same memory as real numbers or integers, which can be combined."""
    if array.dtype.kind == "b":
        return array.view(np.uint8)
    if array.dtype.kind == "c":
        return array.reshape(-1).view(array.real.dtype)
    return array


def summation_of(arrays: Sequence[Array], op: Op, factors: tuple[float, float]) -> Summation | None:
    """The sum or mean that replaces arrays, to be formed together with others; None if they are combined otherwise.

    Args:
        arrays: contiguous arrays of one dtype, as ``as_numbers`` returns them.
        op: the way to combine them.
        factors: factors by which they are multiplied before and after.
    """
    if not arrays or not (op is Sum or (op is Average and is_floating(arrays[0].dtype))):
        return None
    before, after = (None if factor == 1.0 else partial(scale, factor=factor) for factor in factors)
    return Summation(arrays, op is Average, before, after)


def combine(transport: Transport, array: Array, op: Op, lengths: list[int] | None = None) -> None:
    """Combine an array over all ranks, in place. Collective.

    Args:
        transport: transport of the participating ranks.
        array: contiguous array of real numbers or integers, as ``as_numbers`` returns it.
        op: a way to combine them that ``check_op`` accepts.
        lengths: numbers of elements of the tensors that follow each other in a one-dimensional array, for Adasum; a
            single tensor by default.
    """
    wide = accumulator_dtype(array.dtype)
    if op is Sum or (op is Average and is_floating(array.dtype)):
        all_reduce(transport, array, mean=op is Average)
    elif op is Average:
        total = array.astype(_longest(array.dtype))
        all_reduce(transport, total)
        np.copyto(array, _divided(total, transport.size), casting="unsafe")
    elif op is Adasum:
        adasum(transport, array.reshape(-1), [array.size] if lengths is None else lengths)
    elif op is Product:
        combine_gathered(transport, array, np.multiply)
    else:
        values = np.ascontiguousarray(array, wide)
        transport.allreduce(values, "min" if op is Min else "max")
        np.copyto(array, values, casting="same_kind")


def combine_gathered(transport: Transport, array: Array, function: np.ufunc) -> None:
    """Combine an array over all ranks, in place and in the order of ranks, by a function of two arrays. Collective.

    For operations that transports do not have: each rank gathers the arrays of all, piece by piece.

    Args:
        transport: transport of the participating ranks.
        array: contiguous array of real numbers or integers, as ``as_numbers`` returns it.
        function: the function, which combines two numbers.
    """
    wide = accumulator_dtype(array.dtype)
    flat = array.reshape(-1)
    step = max(1, PIECE_BYTES // wide.itemsize)
    for start in range(0, flat.size, step):
        piece = flat[start : start + step]
        gathered = transport.allgather(piece.astype(wide, copy=False))
        with np.errstate(over="ignore", invalid="ignore", under="ignore"):
            np.copyto(piece, function.reduce(gathered, axis=0, dtype=wide), casting="same_kind")


def combine_parts(parts: Sequence[Array], function: np.ufunc = np.add, *, mean: bool = False) -> Array:
    """Combine arrays in their order, by a function of two arrays. Half precision is combined in float32.

    Args:
        parts: arrays of one shape and dtype; not changed.
        function: the function, which combines two numbers.
        mean: whether to divide the result by the number of parts; integers are rounded towards zero.

    Returns:
        a new array of the dtype of the parts.

    Example:
        >>> combine_parts([np.array([100, 1], np.int8), np.array([101, 2], np.int8)], mean=True)
        array([100,   1], dtype=int8)
    """
    dtype = parts[0].dtype
    is_integer = dtype.kind in "iu"
    if is_integer and mean:
        wide = _longest(dtype)
    elif dtype.kind == "c":
        wide = dtype
    else:
        wide = accumulator_dtype(dtype)
    total = parts[0].astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in parts[1:]:
            function(total, part, out=total, casting="same_kind")
        if mean:
            total = _divided(total, len(parts)) if is_integer else total / total.real.dtype.type(len(parts))
        return total.astype(dtype, copy=False)


def _longest(dtype: "np.dtype[Any]") -> "np.dtype[Any]":
    """The dtype in which integers are summed for their average, because the sum may exceed a short one."""
    return np.dtype(np.uint64 if dtype.kind == "u" else np.int64)


def _divided(total: Array, count: int) -> Array:
    """Quotients of an integer array and a positive number, rounded towards zero, as Horovod's average is.

    Example:
        >>> _divided(np.array([-3, 3, 4]), 2).tolist()
        [-1, 1, 2]
    """
    divisor = total.dtype.type(count)
    quotients = total // divisor
    rounded: Array = quotients + ((total < 0) & (total % divisor != 0)).astype(total.dtype)
    return rounded
