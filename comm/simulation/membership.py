"""Elastic virtual ranks: which of them are left after deaths, and the transport with which these continue."""

from collections.abc import Sequence
from random import Random
from typing import NoReturn

from lentando.comm.errors import ConfigurationError, RankLostError
from lentando.comm.simulation.collectives import Collectives
from lentando.comm.simulation.exchange import SimulatedExchange
from lentando.comm.simulation.messages import Mail
from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.tasks import Task, Wait
from lentando.comm.simulation.transport import SimulatedTransport
from lentando.comm.simulation.wires import Wires
from lentando.comm.transport import Message, check_rank

__all__ = ["ElasticTransport", "Membership"]


class _Decision(Wait):
    """A vote or a repair, complete once all members that are not known to be dead have joined it."""

    def __init__(self, membership: "Membership", operation: str) -> None:
        self._membership, self._operation = membership, operation
        self.joined: dict[int, Task] = {}
        self.is_over = False
        self.end_seconds = 0.0
        self.verdict = False
        self.survivors: list[int] = []

    def describe(self) -> str:
        """Return the members that have not joined, and the operation."""
        absent = [task for task in self._membership.living if task.rank not in self.joined]
        return f"{' and '.join(_initial_rank(task) for task in absent)} to {self._operation}"


class Membership:
    """The members of an elastic simulation: the ranks that are left since the last repair.

    Args:
        scheduler: scheduler of the simulation, which reports deaths.
        mail: messages of all ranks.
        wires: network of the running simulation, which gives the duration of a decision.
        notice_seconds: virtual time between a death, or the beginning of a repair, and the errors on other ranks.
        local_size: number of ranks per node when the simulation began.
        chance: random generator that decides which ranks get an error, where MPI libraries differ.
    """

    def __init__(
        self, scheduler: Scheduler, mail: Mail, wires: Wires, notice_seconds: float, local_size: int, chance: Random
    ) -> None:
        self._scheduler, self._mail, self._wires = scheduler, mail, wires
        self._notice_seconds, self._local_size, self._chance = notice_seconds, local_size, chance
        self._transports: list[ElasticTransport] = []
        self._begin([])
        scheduler.on_death(self._schedule_notice)

    def add(self, transport: "ElasticTransport") -> None:
        """Add the transport of a rank, before the simulation begins."""
        self._transports.append(transport)

    def begin(self) -> None:
        """Begin with all ranks that were added."""
        self._begin(self._scheduler.tasks)
        for transport in self._transports:
            transport.renumber()

    def _begin(self, members: Sequence[Task]) -> None:
        self.members = list(members)
        self.collectives = Collectives(self._scheduler, self._wires, self.members, self._chance)
        self._dead: dict[int, str] = {}
        self._ended: str | None = None
        self._needs_repair = False
        self._votes_of_rank: dict[int, int] = {}
        self._votes: dict[int, _Decision] = {}
        self._repair: _Decision | None = None

    @property
    def living(self) -> list[Task]:
        """Members that are not known to be dead."""
        return [task for task in self.members if task.rank not in self._dead]

    def numbers_of(self, task: Task) -> tuple[int, int, int, int]:
        """Return rank, size, local rank and local size of a member."""
        node = task.rank // self._local_size
        same_node = [member for member in self.members if member.rank // self._local_size == node]
        return self.members.index(task), len(self.members), same_node.index(task), len(same_node)

    def exchange(
        self, task: Task, sends: Sequence[Message], receives: Sequence[Message], tag: int
    ) -> SimulatedExchange:
        """Start an exchange between members, which fails if one of them dies."""
        if self._ended is not None:
            raise RankLostError(self._ended)
        outgoing, incoming = (
            [(self.initial_rank(peer), array) for peer, array in messages] for messages in (sends, receives)
        )
        request = self._mail.exchange(task, outgoing, incoming, tag)
        peers = {rank for rank, _ in (*outgoing, *incoming)}
        self._mail.watch(request, peers)
        for rank in peers & self._dead.keys():
            request.fail(self._dead[rank], task.clock)
        return request

    def initial_rank(self, peer: int) -> int:
        """Return the number that the member with the current rank ``peer`` had when the simulation began."""
        check_rank(peer, len(self.members), "exchange with")
        return self.members[peer].rank

    def vote(self, task: Task, yes: bool) -> bool:
        """Vote, as ``Elastic.vote`` does."""
        self._scheduler.check_alive(task)
        number = self._votes_of_rank.get(task.rank, 0)
        self._votes_of_rank[task.rank] = number + 1
        vote = self._votes.setdefault(number, _Decision(self, f"vote (number {number})"))
        vote.joined[task.rank] = task
        if not yes:
            self._require_repair(f"rank {self.members.index(task)} has voted no: call repair(), too", task.clock)
        self._decide_vote(vote, task.clock)
        self._wait_for(task, vote)
        return vote.verdict

    def repair(self, task: Task) -> list[int]:
        """Leave out the dead, as ``Elastic.repair`` does."""
        self._scheduler.check_alive(task)
        if self._repair is None:
            self._repair = _Decision(self, "repair")
            self._require_repair(f"rank {self.members.index(task)} has begun a repair: call repair(), too", task.clock)
        repair = self._repair
        repair.joined[task.rank] = task
        self._decide_repair(repair, task.clock)
        self._wait_for(task, repair)
        return list(repair.survivors)

    def _wait_for(self, task: Task, decision: _Decision) -> None:
        if decision.is_over:
            self._scheduler.advance(task, max(task.clock, decision.end_seconds))
        else:
            self._scheduler.block(task, decision)

    def _schedule_notice(self, task: Task, time: float) -> None:
        self._scheduler.at(time + self._notice_seconds, lambda now: self._report_death(task, now))

    def _report_death(self, task: Task, now: float) -> None:
        if task not in self.members:
            return
        reason = self._dead[task.rank] = f"{_initial_rank(task)} {task.ended}: call repair()"
        self._mail.fail_exchanges_with(task, reason, now)
        self.collectives.fail_collectives_without(task, reason, now)
        for vote in self._votes.values():
            self._decide_vote(vote, now)
        if self._repair is not None:
            self._decide_repair(self._repair, now)

    def _require_repair(self, reason: str, now: float) -> None:
        """Let everything but a repair fail, from ``notice_seconds`` after now."""
        if not self._needs_repair:
            self._needs_repair = True
            for vote in self._votes.values():
                self._decide_vote(vote, now)
            members = self.members
            self._scheduler.at(now + self._notice_seconds, lambda then: self._end(members, reason, then))

    def _end(self, members: Sequence[Task], reason: str, now: float) -> None:
        if members is self.members and self._ended is None:
            self._ended = reason
            self._mail.fail_all(reason, now)
            self.collectives.fail_all(reason, now)

    def _decide_vote(self, vote: _Decision, now: float) -> None:
        """Decide if all have voted, or one has voted no, or one has begun a repair, which will not vote any more."""
        if not vote.is_over and (self._needs_repair or self._is_joined_by_all(vote)):
            vote.verdict = not self._needs_repair and not any(task.died for task in self.members)
            self._close(vote, now)

    def _decide_repair(self, repair: _Decision, now: float) -> None:
        if repair.is_over or not self._is_joined_by_all(repair):
            return
        self._end(self.members, "repaired", now)
        before = self.members
        living = self.living
        repair.survivors = [before.index(task) for task in living]
        self._close(repair, now)
        self._begin(living)
        for task in living:
            self._transports[task.rank].renumber()

    def _is_joined_by_all(self, decision: _Decision) -> bool:
        return all(task.rank in decision.joined for task in self.living)

    def _close(self, decision: _Decision, now: float) -> None:
        decision.is_over = True
        decision.end_seconds = now + self._wires.collective_seconds("barrier", 0)
        for task in decision.joined.values():
            if task.waiting is decision:
                self._scheduler.wake(task, decision.end_seconds)


class ElasticTransport(SimulatedTransport):
    """The transport of a virtual rank that continues when other ranks die. Implements ``Elastic``."""

    _membership: Membership

    def join(self, membership: Membership) -> None:
        """Become a member. Called once, before the rank runs."""
        self._membership = membership
        membership.add(self)

    def renumber(self) -> None:
        """Take this rank's current number, and the collectives of the members, from the membership."""
        self.rank, self.size, self.local_rank, self.local_size = self._membership.numbers_of(self._task)
        self._collectives = self._membership.collectives

    def for_ranks(self, ranks: Sequence[int]) -> NoReturn:
        """Raise ``ConfigurationError``: a subset would not survive a death."""
        raise ConfigurationError("an elastic simulation has no subsets of its ranks")

    def vote(self, yes: bool) -> bool:
        """Vote, as ``Elastic.vote`` does."""
        self._begin_collective()
        return self._membership.vote(self._task, yes)

    def repair(self) -> list[int]:
        """Leave out the dead, as ``Elastic.repair`` does."""
        self._pause()
        if self._faults.dies_in_repair():
            self._die_while_waiting()
        return self._membership.repair(self._task)

    def _initial_rank(self, peer: int) -> int:
        return self._membership.initial_rank(peer)

    def _start_exchange(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> SimulatedExchange:
        return self._membership.exchange(self._task, sends, receives, tag)


def _initial_rank(task: Task) -> str:
    return f"rank {task.rank} of the start"
