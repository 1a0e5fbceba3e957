"""The dtypes in which backends without MPI reduce those that they do not know, or would round too often."""

from collections.abc import Collection
from typing import Any

import numpy as np

from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import TransportError
from lentando.comm.transport import ReduceOp

__all__ = ["reduced_dtype"]

_WIDER = {"bool": "int32", "int8": "int32", "int16": "int32", "uint8": "int32", "uint16": "int32", "uint32": "int64"}


def reduced_dtype(dtype: np.dtype[Any], op: ReduceOp, known: Collection[str], backend: str) -> np.dtype[Any]:
    """The dtype in which arrays of ``dtype`` are reduced: the same, or a wider one.

    Args:
        dtype: dtype of the arrays.
        op: the reduction.
        known: names of the dtypes that the backend reduces as such, int32, int64 and float32 among them.
        backend: name of the backend, for messages.

    Raises:
        TransportError: if there is none.
    """
    if dtype.name in known:
        return dtype
    if dtype == bfloat16 or dtype == np.float16:
        return np.dtype(np.float32)
    if dtype == np.uint64 and op == "sum":
        return np.dtype(np.int64)  # modular sums have the same bits
    if dtype.name in _WIDER:
        return np.dtype(_WIDER[dtype.name])
    raise TransportError(f"{backend} has no all-reduce ({op}) for {dtype}: expected floating point or integers")
