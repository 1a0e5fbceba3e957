"""Collectives that users call themselves, on NumPy arrays: each checks first that all ranks call the same one.

The framework packages wrap these; names and meaning are Horovod's. Calls pair in the order in which ranks make them.
Their names are compared, so that ranks that make them in another order get an error and not each other's values. Calls
of several threads must come in the same order on all ranks, too; see ``lentando.comm.turns``.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from enum import Enum
from typing import Any, TypeVar

import numpy as np

from lentando.comm import objects
from lentando.comm.agreement import Event, Intent, agree, fingerprint
from lentando.comm.collectives import all_reduce
from lentando.comm.dtypes import accumulator_dtype, is_floating
from lentando.comm.elastic import current_rank, in_place, initial_number, transaction
from lentando.comm.errors import ConfigurationError, MismatchError, grouped_by_rank, ranks_in_words
from lentando.comm.transport import Array, Transport
from lentando.comm.turns import turn
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
    "in_shared_order",
]

T = TypeVar("T")

NAMES_SHOWN = 8
"""A message about differing names lists no more than so many of each kind."""


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
        array: contiguous; equal shape and dtype on all ranks. float16 and bfloat16 are summed in float32, complex
            numbers as pairs of real ones.
        op: ``Average`` (floating point and complex only), ``Sum``, ``Min`` or ``Max`` (not of complex numbers). For
            booleans, ``Min`` says whether all ranks have True there, ``Max`` whether any has, and the others are
            refused.
        name: compared between ranks, and shown in messages.

    Raises:
        MismatchError: on every rank, if another calls something else, or with another shape, dtype, op or name.
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

    call = _Call(world, "allreduce", [*described, op.value], name)

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
    """Combine a number over all ranks: in float64, or in int64 where the result is an integer.

    Args:
        value: a Python float, int or bool, equal in kind on all ranks.
        op: ``Average`` gives a float, ``Sum`` of integers and booleans an int, ``Min`` and ``Max`` of booleans a bool.
        name: compared between ranks, and shown in messages.

    Raises:
        ConfigurationError: for an integer so large that int64 may not hold the result.
        MismatchError: as of ``allreduce``.
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
    found: float = array.tolist()[0]
    return found


def allgather(array: Array, name: str | None = None) -> Array:
    """The ranks' arrays, joined along the first axis in which they may differ in length.

    Raises:
        MismatchError: on every rank, if names, dtypes or the other axes differ.
    """
    world = transport()
    if array.ndim == 0:
        array = array.reshape(1)
    call = _Call(world, "allgather", ["any length", *array.shape[1:], array.dtype.name], name)

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

    Raises:
        MismatchError: on every rank, if name, shape, dtype or root differ.
    """
    world = transport()
    root = _Root(world, root_rank)
    call = _Call(world, "broadcast", [*_described(array), f"from rank {root_rank}"], name)

    def attempt() -> None:
        call.agree()
        world.broadcast(array, root.now)

    call.run(lambda: in_place(world, [array], attempt))


def broadcast_object(
    value: Any, root_rank: int = 0, name: str | None = None, plain: Callable[[Any], Any] | None = None
) -> Any:
    """The root's object on every rank, without pickle; see ``lentando.comm.objects`` for what it may hold.

    Args:
        value: the object; that of other ranks than the root is not looked at.
        root_rank: rank whose object all get.
        name: compared between ranks, and shown in messages.
        plain: makes what may travel of the object, and raises ``ConfigurationError`` if it cannot.
    """
    world = transport()
    root = _Root(world, root_rank)
    call = _Call(world, "broadcast_object", [f"from rank {root_rank}"], name)

    def attempt() -> Any:
        call.agree()
        return objects.broadcast_object(world, value, root.now, plain)

    return call.run(lambda: transaction(world, attempt))


def allgather_object(value: Any, name: str | None = None, plain: Callable[[Any], Any] | None = None) -> list[Any]:
    """Every rank's object, by rank; arguments as of ``broadcast_object``."""
    world = transport()
    call = _Call(world, "allgather_object", [], name)

    def attempt() -> list[Any]:
        call.agree()
        return objects.allgather_object(world, value, plain)

    return call.run(lambda: transaction(world, attempt))


def barrier() -> None:
    """Return once every rank has come here."""
    world = transport()
    call = _Call(world, "barrier", [], None)
    call.run(lambda: transaction(world, call.agree))  # when all ranks have agreed, all have come here


def in_shared_order(operation: str, described: Sequence[tuple[str, str]], root_rank: int) -> list[int]:
    """The order in which all ranks go through tensors that each lists in an order of its own: that of their names.

    Collective.

    Args:
        operation: what is done with the tensors, for messages.
        described: name of each tensor, and its shape and dtype in words. Of several with one name, those of the same
            place among them belong together.
        root_rank: of the operation; must be equal on all ranks.

    Returns:
        indices into ``described``.

    Raises:
        MismatchError: on every rank, if the names differ, or what they stand for; says which ranks have what.
    """
    world = transport()
    names = numbered([name for name, _ in described])
    own = sorted(zip(names, (about for _, about in described), range(len(names)), strict=True))
    listed = [[name, about] for name, about, _ in own]
    call = _Call(world, operation, [f"from rank {root_rank}"], None)

    def attempt() -> None:
        call.agree()
        subject = np.array([fingerprint(listed)], np.int64)
        if (world.allgather(subject) != subject).any():
            raise MismatchError(f"{operation}: {_differences(objects.allgather_object(world, listed))}")

    call.run(lambda: transaction(world, attempt))
    return [number for _, _, number in own]


def numbered(names: Iterable[str]) -> list[str]:
    """The names, with a number behind each that has occurred before: ``w``, ``w (2)``."""
    seen: Counter[str] = Counter()
    found = []
    for name in names:
        seen[name] += 1
        found.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return found


def _differences(by_rank: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Which tensors ranks lack, or have in another shape or dtype."""
    tables: list[dict[str, str]] = [dict(pairs) for pairs in by_rank]
    everywhere = {name: None for table in tables for name in table}
    lacking = {name: tuple(rank for rank, table in enumerate(tables) if name not in table) for name in everywhere}
    sentences = []
    for ranks in sorted({ranks for ranks in lacking.values() if ranks}):
        missing = [name for name, by in lacking.items() if by == ranks]
        more = f" and {len(missing) - NAMES_SHOWN} more" if len(missing) > NAMES_SHOWN else ""
        shown = ", ".join(map(repr, missing[:NAMES_SHOWN]))
        sentences.append(f"{shown}{more} not on {ranks_in_words(ranks)}")
    for name in everywhere:
        if not lacking[name] and len({table[name] for table in tables}) > 1 and len(sentences) < NAMES_SHOWN:
            sentences.append(f"{name!r} is {grouped_by_rank([table[name] for table in tables])}")
    return f"the ranks' tensors differ: {'. '.join(sentences)}. Give tensors of the same names, shapes and dtypes"


def _described(array: Array) -> list[Any]:
    return [list(array.shape), array.dtype.name]


class _Root:
    """The rank whose value the others get: the same process, even if others die meanwhile and its number changes."""

    def __init__(self, world: Transport, rank: int) -> None:
        if not 0 <= rank < world.size:
            raise ConfigurationError(f"root_rank must be a rank of this job, 0 to {world.size - 1}, got {rank}")
        self._world = world
        self._number = initial_number(world, rank)

    @property
    def now(self) -> int:
        """Its rank."""
        return current_rank(self._world, self._number, "broadcast")


class _Call:
    """A collective of the user's.

    Args:
        world: of the job.
        operation: its name.
        arguments: what must be equal on all ranks, as JSON.
        name: of the call, given by the user.
    """

    def __init__(self, world: Transport, operation: str, arguments: list[Any], name: str | None) -> None:
        self._world = world
        self._words = f"calls {operation}({', '.join(map(str, arguments))})" + (f" named {name!r}" if name else "")
        self._intent = Intent(Event.OPERATION, subject=fingerprint([operation, *arguments, name]))

    def agree(self) -> None:
        """Find out whether all ranks make the same call."""
        agree(self._world, self._intent, lambda: self._words)

    def run(self, function: Callable[[], T]) -> T:
        """Do it when no other thread of this rank is at such a call."""
        with turn(self._world, self._intent):
            return function()
