"""The reductions of torch.distributed, on flat arrays."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from lentando.comm.operations.combining import as_numbers, combine, combine_gathered, combine_parts
from lentando.comm.operations.op import Average, Max, Min, Product, Sum
from lentando.comm.operations.slices import exchange_slices
from lentando.comm.transport import Array, Transport

__all__ = ["name_of", "reduce_array", "reduce_parts"]

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


def reduce_array(transport: Transport, array: Array, op: str) -> None:
    """Combine an array over all ranks, in place. Collective.

    Args:
        transport: transport of the participating ranks.
        array: one-dimensional, contiguous array, as ``as_numbers`` returns it.
        op: a name that ``name_of`` has returned for its dtype.
    """
    if op in _OPS:
        combine(transport, array, _OPS[op])
    else:
        combine_gathered(transport, array, _FUNCTIONS[op])


def reduce_parts(transport: Transport, inputs: Sequence[Array], output: Array, op: str) -> None:
    """Give each rank the combination of what all ranks have for it, in the order of ranks. Collective.

    Args:
        transport: transport of the participating ranks.
        inputs: for each rank a one-dimensional, contiguous array of the length of ``output``.
        output: array to be filled.
        op: a name that ``name_of`` has returned for the dtype.
    """
    received = exchange_slices(transport, inputs)
    total = combine_parts([as_numbers(part) for part in received], _FUNCTIONS[op], mean=op == "AVG")
    as_numbers(output)[...] = total
