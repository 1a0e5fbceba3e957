"""The ways in which values of several ranks are combined, and what each is defined for."""

from collections.abc import Sequence
from enum import Enum
from typing import Any

import numpy as np

from lentando.comm.dtypes import accumulator_dtype, is_floating
from lentando.comm.errors import ConfigurationError, UnsupportedOperationError

__all__ = ["Adasum", "Average", "Max", "Min", "Op", "Product", "Sum", "check_op"]


class Op(Enum):
    """The ways in which ``allreduce`` and ``reducescatter`` combine the values of the ranks.

    ``Adasum`` combines gradients such that orthogonal ones are added and parallel ones averaged
    (``lentando.comm.operations.adasum``).
    """

    Average = "average"
    Sum = "sum"
    Adasum = "adasum"
    Min = "min"
    Max = "max"
    Product = "product"


Average, Sum, Adasum, Min, Max, Product = Op.Average, Op.Sum, Op.Adasum, Op.Min, Op.Max, Op.Product


def check_op(op: Any, dtype: np.dtype[Any], allowed: Sequence[Op] = tuple(Op), operation: str = "allreduce") -> None:
    """Check that an op is one, and is defined for an operation and for arrays of a dtype.

    Raises:
        ConfigurationError: if not.
    """
    if not isinstance(op, Op):
        raise ConfigurationError(f"op must be {_in_words(allowed)}, got {op!r}")
    if op not in allowed:
        raise UnsupportedOperationError(
            f"{operation} with op={op.name} is not defined: expected {_in_words(allowed)}. Use allreduce, and take "
            "this rank's rows of the result"
        )
    if dtype == np.bool_ and op not in (Min, Max):
        raise UnsupportedOperationError(
            f"{op.name} of bool is not a bool: use op=Max (True on any rank) or op=Min (True on all), or convert "
            "to integers or floating point to count"
        )
    if dtype.kind == "c" and op not in (Sum, Average):
        raise UnsupportedOperationError(
            f"{op.name} of {dtype}: complex numbers have no order, and are combined as pairs of real ones. Use op=Sum "
            "or op=Average, or combine magnitudes or real and imaginary parts"
        )
    if op is Adasum and not is_floating(dtype):
        raise UnsupportedOperationError(f"Adasum of {dtype}: it combines gradients, which are floating point")
    if dtype != np.bool_ and dtype.kind != "c":
        accumulator_dtype(dtype)


def _in_words(ops: Sequence[Op]) -> str:
    *names, last = [op.name for op in ops]
    return f"{', '.join(names)} or {last}"
