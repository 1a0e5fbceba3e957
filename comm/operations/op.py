"""The ways in which values of several ranks are combined, and what each is defined for."""

from enum import Enum
from typing import Any

import numpy as np

from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import ConfigurationError

__all__ = ["Average", "Max", "Min", "Op", "Sum", "check_op"]


class Op(Enum):
    """The ways in which ``allreduce`` and ``reducescatter`` combine the values of the ranks."""

    Average = "average"
    Sum = "sum"
    Min = "min"
    Max = "max"


Average, Sum, Min, Max = Op.Average, Op.Sum, Op.Min, Op.Max


def check_op(op: Any, dtype: np.dtype[Any]) -> None:
    """Check that an op is one, and is defined for arrays of a dtype.

    Raises:
        ConfigurationError: if not.
    """
    if not isinstance(op, Op):
        raise ConfigurationError(f"op must be Average, Sum, Min or Max, got {op!r}")
    if dtype == np.bool_:
        if op not in (Min, Max):
            raise ConfigurationError(
                f"{op.name} of bool is not a bool: use op=Max (True on any rank) or op=Min (True on all), or convert "
                "to integers or floating point to count"
            )
    elif dtype.kind == "c":
        if op not in (Sum, Average):
            raise ConfigurationError(
                f"{op.name} of {dtype}: complex numbers have no order. Use op=Sum or op=Average, or combine "
                "magnitudes or real and imaginary parts"
            )
    else:
        accumulator_dtype(dtype)
