"""All-reduce of dtypes that backends without MPI do not know, or would round too often: in another dtype, and back."""

from collections.abc import Callable, Collection
from typing import Any

import numpy as np

from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import TransportError
from lentando.comm.extremes import from_ordered, needs_order, to_ordered
from lentando.comm.transport import Array, ReduceOp

__all__ = ["reduce_by"]

_WIDER = {"bool": "int32", "int8": "int32", "int16": "int32", "uint8": "int32", "uint16": "int32", "uint32": "int64"}


def reduce_by(
    reduce: Callable[[Array], object], array: Array, op: ReduceOp, known: Collection[str], backend: str
) -> None:
    """Combine an array over all ranks, in place, by the all-reduce of a backend. Collective.

    Args:
        reduce: combines a one-dimensional array of a known dtype over all ranks, in place, by this op.
        array: the array, of any dtype and shape.
        op: the reduction.
        known: names of the dtypes that the backend reduces as such, int32, int64 and float32 among them.
        backend: name of the backend, for messages.

    Raises:
        TransportError: if none of them can represent the values of the array.
    """
    flat = array.reshape(-1)
    in_order = needs_order(flat, op)
    reduced_as = _reduced_dtype(array.dtype, op, known, backend)
    reduced = to_ordered(flat, op) if in_order else flat.astype(reduced_as, copy=False)
    reduce(reduced)
    if in_order:
        from_ordered(reduced, flat)
    elif reduced is not flat:
        with np.errstate(over="ignore", invalid="ignore"):  # the backends do not warn of overflow either
            flat[...] = reduced.astype(array.dtype)


def _reduced_dtype(dtype: np.dtype[Any], op: ReduceOp, known: Collection[str], backend: str) -> np.dtype[Any]:
    """The dtype in which arrays of ``dtype`` are reduced: the same, or a wider one."""
    if dtype.name in known:
        return dtype
    if dtype == bfloat16 or dtype == np.float16:
        return np.dtype(np.float32)
    if dtype == np.uint64 and op == "sum":
        return np.dtype(np.int64)  # modular sums have the same bits
    if dtype.name in _WIDER:
        return np.dtype(_WIDER[dtype.name])
    raise TransportError(f"{backend} has no all-reduce ({op}) for {dtype}: expected floating point or integers")
