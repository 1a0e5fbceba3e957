"""The reductions of torch.distributed, on flat arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lentando.c10d.exchanges import exchange_parts
from lentando.comm.dtypes import accumulator_dtype, is_floating
from lentando.comm.operations.combining import combine, divided
from lentando.comm.operations.op import Average, Max, Min, Product, Sum
from lentando.comm.transport import Array, Transport

__all__ = ["as_numbers", "name_of", "reduce_array", "reduce_parts"]

PIECE_BYTES = 1 << 20
"""Bytes of each rank that are gathered at once for operations on bits."""

_OPS = {"SUM": Sum, "AVG": Average, "MIN": Min, "MAX": Max, "PRODUCT": Product}
_FUNCTIONS: dict[str, np.ufunc] = {
    "SUM": np.add,
    "AVG": np.add,
    "MIN": np.minimum,
    "MAX": np.maximum,
    "PRODUCT": np.multiply,
    "BAND": np.bitwise_and,
    "BOR": np.bitwise_or,
    "BXOR": np.bitwise_xor,
}
_OF_BOOLEANS = {"SUM": "MAX", "BOR": "MAX", "PRODUCT": "MIN", "BAND": "MIN", "MIN": "MIN", "MAX": "MAX", "BXOR": "BXOR"}
"""For values 0 and 1, an operation with the same result that keeps them."""


def name_of(op: Any, dtype: "np.dtype[Any]", operation: str) -> str:
    """The name of a reduction that ``reduce_array`` takes, such as ``"SUM"``.

    Args:
        op: reduction as torch.distributed passes it.
        dtype: dtype of the values.
        operation: name of the call, for messages.

    Raises:
        ValueError: if it is not defined for the dtype, or not supported.
    """
    name: str = getattr(op, "op", op).name
    if name not in _FUNCTIONS:
        raise ValueError(f"{operation} with ReduceOp.{name} is not supported: scale the tensor before a ReduceOp.SUM")
    if dtype == np.bool_:
        if name == "AVG":
            raise ValueError(f"{operation} with ReduceOp.AVG is not defined for booleans")
        return _OF_BOOLEANS[name]
    if name not in _OPS and dtype.kind not in "iu":
        raise ValueError(f"{operation} with ReduceOp.{name} needs integers or booleans, got {dtype}")
    if dtype.kind == "c" and name not in ("SUM", "AVG"):
        raise ValueError(f"{operation} with ReduceOp.{name} is not defined for {dtype}")
    return name


def as_numbers(array: Array) -> Array:
    """The memory of a one-dimensional array as real numbers or integers, which can be combined."""
    if array.dtype == np.bool_:
        return array.view(np.uint8)
    return array.view(array.real.dtype) if array.dtype.kind == "c" else array


def reduce_array(transport: Transport, array: Array, op: str) -> None:
    """Combine an array over all ranks, in place. Collective.

    Args:
        transport: transport of the participating ranks.
        array: one-dimensional, contiguous array, as ``as_numbers`` returns it.
        op: a name that ``name_of`` has returned for its dtype.
    """
    if op in _OPS:
        combine(transport, array, _OPS[op])
        return
    step = max(1, PIECE_BYTES // array.itemsize)
    for start in range(0, array.size, step):
        piece = array[start : start + step]
        _FUNCTIONS[op].reduce(transport.allgather(piece), axis=0, out=piece)


def reduce_parts(transport: Transport, inputs: Sequence[Array], output: Array, op: str) -> None:
    """Give each rank the combination of what all ranks have for it, in the order of ranks. Collective.

    Args:
        transport: transport of the participating ranks.
        inputs: for each rank an array of the length of ``output``, as ``as_numbers`` returns it.
        output: array to be filled.
        op: a name that ``name_of`` has returned for the dtype.
    """
    received = [np.empty_like(output) for _ in inputs]
    exchange_parts(transport, inputs, received)
    is_wide_average = op == "AVG" and not is_floating(output.dtype)
    wide = accumulator_dtype(output.dtype)
    if is_wide_average:
        wide = np.dtype(np.uint64 if output.dtype.kind == "u" else np.int64)
    total = received[0].astype(wide)
    with np.errstate(over="ignore", invalid="ignore"):
        for part in received[1:]:
            _FUNCTIONS[op](total, part, out=total, casting="same_kind")
        if op == "AVG":
            total = divided(total, transport.size) if is_wide_average else total / wide.type(transport.size)
        np.copyto(output, total, casting="unsafe")
