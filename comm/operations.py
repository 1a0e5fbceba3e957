"""Collectives that users call themselves, on NumPy arrays: each checks first that all ranks call the same one.

The framework packages wrap these; names and meaning are Horovod's.
"""

from enum import Enum
from typing import Any

import numpy as np

from lentando.comm import objects
from lentando.comm.collectives import all_reduce
from lentando.comm.control import Control, Event, agree, fingerprint
from lentando.comm.dtypes import accumulator_dtype, is_floating
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array, Transport
from lentando.comm.world import transport

__all__ = [
    "Average",
    "Max",
    "Min",
    "Op",
    "Sum",
    "allgather",
    "allgather_object",
    "allreduce",
    "barrier",
    "broadcast",
    "broadcast_object",
]


class Op(Enum):
    """How ``allreduce`` combines the ranks' values."""

    Average = "average"
    Sum = "sum"
    Min = "min"
    Max = "max"


Average, Sum, Min, Max = Op.Average, Op.Sum, Op.Min, Op.Max


def allreduce(array: Array, op: Op = Average, name: str | None = None) -> None:
    """Combine ``array`` over all ranks, in place; equal to the bit on every rank afterwards.

    Args:
        array: contiguous; equal shape and dtype on all ranks. float16 and bfloat16 are summed in float32.
        op: ``Average`` (floating point only), ``Sum``, ``Min`` or ``Max``.
        name: for messages, if ranks disagree.

    Raises:
        MismatchError: on every rank, if another calls something else, or with another shape, dtype or op.
    """
    world = transport()
    if not isinstance(op, Op):
        raise ConfigurationError(f"op must be Average, Sum, Min or Max, got {op!r}")
    accumulator_dtype(array.dtype)
    if op is Average and not is_floating(array.dtype):
        raise ConfigurationError(
            f"Average of {array.dtype} is not of that dtype: use op=Sum, or convert to floating point"
        )
    _agree(world, "allreduce", [*_described(array), op.value], name)
    if op is Average or op is Sum:
        all_reduce(world, array, mean=op is Average)
        return
    wide = np.ascontiguousarray(array, accumulator_dtype(array.dtype))
    world.allreduce(wide, "min" if op is Min else "max")
    np.copyto(array, wide, casting="same_kind")


def allgather(array: Array, name: str | None = None) -> Array:
    """The ranks' arrays, joined along the first axis in which they may differ in length.

    Raises:
        MismatchError: on every rank, if dtypes or the other axes differ.
    """
    world = transport()
    if array.ndim == 0:
        array = array.reshape(1)
    _agree(world, "allgather", ["any length", *array.shape[1:], array.dtype.name], name)
    lengths = world.allgather(np.array([array.shape[0]], np.int64))[:, 0]
    padded = np.zeros((int(lengths.max()), *array.shape[1:]), array.dtype)
    padded[: array.shape[0]] = array
    gathered = world.allgather(padded)
    return np.concatenate([gathered[rank, :length] for rank, length in enumerate(lengths)])


def broadcast(array: Array, root_rank: int = 0, name: str | None = None) -> None:
    """Fill ``array`` on every rank with the root's.

    Raises:
        MismatchError: on every rank, if shape, dtype or root differ.
    """
    world = transport()
    _check_root(world, root_rank)
    _agree(world, "broadcast", [*_described(array), f"from rank {root_rank}"], name)
    world.broadcast(array, root_rank)


def broadcast_object(value: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """The root's object on every rank: numbers, strings, lists, tuples, dicts and arrays, without pickle."""
    world = transport()
    _check_root(world, root_rank)
    _agree(world, "broadcast_object", [f"from rank {root_rank}"], name)
    return objects.broadcast_object(world, value, root_rank)


def allgather_object(value: Any, name: str | None = None) -> list[Any]:
    """Every rank's object, by rank."""
    world = transport()
    _agree(world, "allgather_object", [], name)
    return objects.allgather_object(world, value)


def barrier() -> None:
    """Return once every rank has come here."""
    _agree(transport(), "barrier", [], None)  # all ranks have agreed: that is a barrier


def _described(array: Array) -> list[Any]:
    return [list(array.shape), array.dtype.name]


def _check_root(world: Transport, root: int) -> None:
    if not 0 <= root < world.size:
        raise ConfigurationError(f"root_rank must be a rank of this job, 0 to {world.size - 1}, got {root}")


def _agree(world: Transport, operation: str, arguments: list[Any], name: str | None) -> None:
    subject = fingerprint([operation, *arguments])
    words = f"calls {operation}({', '.join(map(str, arguments))})" + (f" named {name!r}" if name else "")
    agree(world, Control(Event.OPERATION, subject=subject), lambda: words)
