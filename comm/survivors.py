"""The living ranks of an elastic job: they vote on what has happened, and recover together from deaths."""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Protocol, TypeVar, runtime_checkable
from weakref import WeakValueDictionary

from lentando.comm.capabilities import Elastic
from lentando.comm.errors import LentandoError, RankLostError
from lentando.comm.notices import forget_neighbors
from lentando.comm.objects import allgather_object
from lentando.comm.stall import watched
from lentando.comm.transport import Transport

__all__ = ["Member", "Survivors"]

_log = logging.getLogger("lentando")

T = TypeVar("T")


@runtime_checkable
class Member(Protocol):
    """An object that the ranks have planned together, and plan again after a death."""

    def recover(self) -> None:
        """Plan the object again for the surviving ranks. Collective; repeated if another rank dies meanwhile."""

    def position(self) -> str:
        """How far it has come, for the log: ``after inner step 7``."""


class Survivors:
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
        """Exchange the names of the ranks' hosts. Collective."""
        hosts: list[str] = self.transaction(transport, lambda: allgather_object(transport, os.uname().nodename))
        self._hosts = [""] * (max(self.numbers) + 1)
        for number, host in zip(self.numbers, hosts, strict=True):
            self._hosts[number] = f" on {host}"

    def enlist(self, member: Member) -> None:
        """Let a member recover after each death from now on."""
        self._members[self._enlisted] = member
        self._enlisted += 1

    def transaction(
        self, transport: Transport, attempt: Callable[[], T], undo: Callable[[], object] | None = None
    ) -> T:
        """Execute an operation and repeat it as often as ranks die meanwhile; see ``lentando.comm.elastic``."""
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
        """Execute an operation with some ranks, once. Returns False if ranks have died, and all have recovered."""
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
