"""Collectives for users, on NumPy arrays. Each checks first that all ranks make the same call.

The framework packages wrap them; names and semantics are Horovod's. Calls are matched in the order in which ranks make
them. Their names are compared, so that ranks that make them in different orders get an error and not each other's
values. Calls of several threads are matched as the module ``lentando.comm.turns`` describes.
"""

from collections.abc import Callable
from enum import Enum
from typing import Any

import numpy as np

from lentando.comm import objects
from lentando.comm.checked_calls import CheckedCall, Root
from lentando.comm.collectives import all_reduce
from lentando.comm.dtypes import accumulator_dtype, is_floating
from lentando.comm.elastic import in_place, transaction
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
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
    "allreduce_number",
    "barrier",
    "broadcast",
    "broadcast_object",
]


class Op(Enum):
    """The ways in which ``allreduce`` combines the values of the ranks."""

    Average = "average"
    Sum = "sum"
    Min = "min"
    Max = "max"


Average, Sum, Min, Max = Op.Average, Op.Sum, Op.Min, Op.Max


def allreduce(array: Array, op: Op = Average, name: str | None = None) -> None:
    """Combine ``array`` over all ranks, in place. The result is bit-identical on every rank.

    Args:
        array: contiguous array of any shape and numeric dtype, equal on all ranks. float16 and bfloat16 are summed in
            float32, complex numbers as pairs of real ones.
        op: ``Average`` (floating point and complex only), ``Sum``, ``Min`` or ``Max`` (not of complex numbers). Of
            booleans, only ``Min`` (True if all ranks have True) and ``Max`` (True if any rank has) are defined.
        name: name of the call, compared between ranks and shown in messages.

    Raises:
        MismatchError: on every rank, if ranks make different calls, or with different shapes, dtypes, ops or names.
        ConfigurationError: if ``op`` is not defined for the dtype.

    Example:
        >>> from lentando.comm.testing import run_ranks
        >>> from lentando.comm.world import simulated_rank
        >>> def average(transport):
        ...     with simulated_rank(transport):  # in a program: init()
        ...         array = np.array([1.0, 2.0]) * transport.rank
        ...         allreduce(array)
        ...         return array.tolist()
        >>> run_ranks(3, average)[0]
        [1.0, 2.0]
    """
    world = transport()
    if not isinstance(op, Op):
        raise ConfigurationError(f"op must be Average, Sum, Min or Max, got {op!r}")
    if array.dtype == np.bool_:
        if op in (Sum, Average):
            raise ConfigurationError(
                f"{op.name} of bool is not a bool: use op=Max (True on any rank) or op=Min (True on all), or convert "
                "to integers or floating point to count"
            )
        array = array.view(np.uint8)
    described = _described(array)
    if array.dtype.kind == "c":
        if op in (Min, Max):
            raise ConfigurationError(
                f"{op.name} of {array.dtype}: complex numbers have no order. Use op=Sum or op=Average, or combine "
                "magnitudes or real and imaginary parts"
            )
        array = array.reshape(-1).view(array.real.dtype)  # pairs of real numbers
    accumulator_dtype(array.dtype)
    if op is Average and not is_floating(array.dtype):
        raise ConfigurationError(
            f"Average of {array.dtype} is not of that dtype: use op=Sum, or convert to floating point"
        )

    call = CheckedCall(world, "allreduce", [*described, op.value], name)

    def attempt() -> None:
        call.agree()
        if op is Average or op is Sum:
            all_reduce(world, array, mean=op is Average)
            return
        wide = np.ascontiguousarray(array, accumulator_dtype(array.dtype))
        world.allreduce(wide, "min" if op is Min else "max")
        np.copyto(array, wide, casting="same_kind")

    call.run(lambda: in_place(world, [array], attempt))


def allreduce_number(value: float, op: Op = Average, name: str | None = None) -> float:
    """Combine a number over all ranks, in float64, or in int64 where the result is an integer.

    Args:
        value: a Python float, int or bool, of the same type on all ranks.
        op: as for ``allreduce``. ``Average`` returns a float, ``Sum`` of integers and booleans an int, ``Min`` and
            ``Max`` of booleans a bool.
        name: name of the call, compared between ranks and shown in messages.

    Raises:
        ConfigurationError: for an integer so large that int64 may not hold the result.
        MismatchError: as for ``allreduce``.
    """
    dtype: np.dtype[Any] = np.dtype(np.float64)
    if isinstance(value, bool) and op in (Min, Max):
        dtype = np.dtype(np.bool_)
    elif isinstance(value, int) and op is not Average:
        dtype = np.dtype(np.int64)
    if dtype == np.int64:
        most = 63 - ((transport().size - 1).bit_length() if op is Sum else 0)
        if not -(2**most) <= value < 2**most:
            raise ConfigurationError(
                f"allreduce of an integer of {int(value).bit_length()} bits: expected {most} at most, so that int64 "
                "holds the result"
            )
    array = np.array([value], dtype)
    allreduce(array, op, name)
    result: float = array.tolist()[0]
    return result


def allgather(array: Array, name: str | None = None) -> Array:
    """Concatenate the arrays of all ranks along the first axis, in which their lengths may differ.

    Args:
        array: array of any numeric dtype; dtype and all axes but the first are equal on all ranks.
        name: name of the call, compared between ranks and shown in messages.

    Raises:
        MismatchError: on every rank, if names, dtypes or the other axes differ between ranks.
    """
    world = transport()
    if array.ndim == 0:
        array = array.reshape(1)
    call = CheckedCall(world, "allgather", ["any length", *array.shape[1:], array.dtype.name], name)

    def attempt() -> Array:
        call.agree()
        lengths = world.allgather(np.array([array.shape[0]], np.int64))[:, 0]
        padded = np.zeros((int(lengths.max()), *array.shape[1:]), array.dtype)
        padded[: array.shape[0]] = array
        gathered = world.allgather(padded)
        return np.concatenate([gathered[rank, :length] for rank, length in enumerate(lengths)])

    return call.run(lambda: transaction(world, attempt))


def broadcast(array: Array, root_rank: int = 0, name: str | None = None) -> None:
    """Fill ``array`` on every rank with the root's.

    Args:
        array: contiguous array, of equal shape and dtype on all ranks.
        root_rank: rank whose array the others get.
        name: name of the call, compared between ranks and shown in messages.

    Raises:
        MismatchError: on every rank, if name, shape, dtype or root differ between ranks.
    """
    world = transport()
    root = Root(world, root_rank)
    call = CheckedCall(world, "broadcast", [*_described(array), f"from rank {root_rank}"], name)

    def attempt() -> None:
        call.agree()
        world.broadcast(array, root.now)

    call.run(lambda: in_place(world, [array], attempt))


def broadcast_object(
    value: Any, root_rank: int = 0, name: str | None = None, plain: Callable[[Any], Any] | None = None
) -> Any:
    """Return the root's object on every rank. It is sent without pickle.

    Args:
        value: the object, of the types that the module ``lentando.comm.objects`` lists. Ignored on all ranks but the
            root.
        root_rank: rank whose object all ranks get.
        name: name of the call, compared between ranks and shown in messages.
        plain: converts the object to these types, and raises ``ConfigurationError`` if it cannot.

    Raises:
        MismatchError: on every rank, if name or root differ between ranks.
        ConfigurationError: on every rank, if the object cannot be sent.
    """
    world = transport()
    root = Root(world, root_rank)
    call = CheckedCall(world, "broadcast_object", [f"from rank {root_rank}"], name)

    def attempt() -> Any:
        call.agree()
        return objects.broadcast_object(world, value, root.now, plain)

    return call.run(lambda: transaction(world, attempt))


def allgather_object(value: Any, name: str | None = None, plain: Callable[[Any], Any] | None = None) -> list[Any]:
    """Return the objects of all ranks, by rank. They are sent without pickle.

    Args:
        value: this rank's object, of the types that the module ``lentando.comm.objects`` lists.
        name: name of the call, compared between ranks and shown in messages.
        plain: converts the object to these types, and raises ``ConfigurationError`` if it cannot.

    Raises:
        MismatchError: on every rank, if names differ between ranks.
        ConfigurationError: on every rank, if the object of one of them cannot be sent.
    """
    world = transport()
    call = CheckedCall(world, "allgather_object", [], name)

    def attempt() -> list[Any]:
        call.agree()
        return objects.allgather_object(world, value, plain)

    return call.run(lambda: transaction(world, attempt))


def barrier() -> None:
    """Return once every rank has called this function."""
    world = transport()
    call = CheckedCall(world, "barrier", [], None)
    call.run(lambda: transaction(world, call.agree))  # once all ranks have agreed, all have called it


def _described(array: Array) -> list[Any]:
    return [list(array.shape), array.dtype.name]
