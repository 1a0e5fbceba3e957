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
from lentando.comm.elastic import began_as, in_place, number_now, transaction
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

    def attempt() -> None:
        _agree(world, "allreduce", [*_described(array), op.value], name)
        if op is Average or op is Sum:
            all_reduce(world, array, mean=op is Average)
            return
        wide = np.ascontiguousarray(array, accumulator_dtype(array.dtype))
        world.allreduce(wide, "min" if op is Min else "max")
        np.copyto(array, wide, casting="same_kind")

    in_place(world, [array], attempt)


def allgather(array: Array, name: str | None = None) -> Array:
    """The ranks' arrays, joined along the first axis in which they may differ in length.

    Raises:
        MismatchError: on every rank, if dtypes or the other axes differ.
    """
    world = transport()
    if array.ndim == 0:
        array = array.reshape(1)

    def attempt() -> Array:
        _agree(world, "allgather", ["any length", *array.shape[1:], array.dtype.name], name)
        lengths = world.allgather(np.array([array.shape[0]], np.int64))[:, 0]
        padded = np.zeros((int(lengths.max()), *array.shape[1:]), array.dtype)
        padded[: array.shape[0]] = array
        gathered = world.allgather(padded)
        return np.concatenate([gathered[rank, :length] for rank, length in enumerate(lengths)])

    return transaction(world, attempt)


def broadcast(array: Array, root_rank: int = 0, name: str | None = None) -> None:
    """Fill ``array`` on every rank with the root's.

    Raises:
        MismatchError: on every rank, if shape, dtype or root differ.
    """
    world = transport()
    root = _Root(world, root_rank)

    def attempt() -> None:
        _agree(world, "broadcast", [*_described(array), f"from rank {root.now}"], name)
        world.broadcast(array, root.now)

    in_place(world, [array], attempt)


def broadcast_object(value: Any, root_rank: int = 0, name: str | None = None) -> Any:
    """The root's object on every rank: numbers, strings, lists, tuples, dicts and arrays, without pickle."""
    world = transport()
    root = _Root(world, root_rank)

    def attempt() -> Any:
        _agree(world, "broadcast_object", [f"from rank {root.now}"], name)
        return objects.broadcast_object(world, value, root.now)

    return transaction(world, attempt)


def allgather_object(value: Any, name: str | None = None) -> list[Any]:
    """Every rank's object, by rank."""
    world = transport()

    def attempt() -> list[Any]:
        _agree(world, "allgather_object", [], name)
        return objects.allgather_object(world, value)

    return transaction(world, attempt)


def barrier() -> None:
    """Return once every rank has come here."""
    world = transport()
    transaction(world, lambda: _agree(world, "barrier", [], None))  # all ranks have agreed: that is a barrier


def _described(array: Array) -> list[Any]:
    return [list(array.shape), array.dtype.name]


class _Root:
    """The rank whose value the others get: the same process, even if others die meanwhile and its number changes."""

    def __init__(self, world: Transport, rank: int) -> None:
        if not 0 <= rank < world.size:
            raise ConfigurationError(f"root_rank must be a rank of this job, 0 to {world.size - 1}, got {rank}")
        self._world = world
        self._number = began_as(world, rank)

    @property
    def now(self) -> int:
        """Its rank."""
        return number_now(self._world, self._number, "broadcast")


def _agree(world: Transport, operation: str, arguments: list[Any], name: str | None) -> None:
    subject = fingerprint([operation, *arguments])
    words = f"calls {operation}({', '.join(map(str, arguments))})" + (f" named {name!r}" if name else "")
    agree(world, Control(Event.OPERATION, subject=subject), lambda: words)
