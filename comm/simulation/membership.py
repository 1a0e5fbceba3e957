"""Ranks that go on when others die: what the living decide together, and their transport."""

from collections.abc import Sequence
from random import Random

from lentando.comm.errors import RankLostError
from lentando.comm.simulation.collectives import Collectives
from lentando.comm.simulation.messages import Mail, SimulatedExchange
from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.tasks import Task, Wait
from lentando.comm.simulation.transport import SimulatedTransport
from lentando.comm.simulation.wires import Wires
from lentando.comm.transport import Message, check_rank

__all__ = ["ElasticTransport", "Membership"]


class _Assembly(Wait):
    """A vote or a repair: who has come to it. Complete when all have that are not known to be dead."""

    def __init__(self, crew: "Membership", what: str) -> None:
        self._crew, self._what = crew, what
        self.come: dict[int, Task] = {}
        self.is_over = False
        self.end_seconds = 0.0
        self.verdict = False
        self.survivors: list[int] = []

    def in_words(self) -> str:
        """As ``Wait.in_words``."""
        absent = [task for task in self._crew.living if task.rank not in self.come]
        return f"{' and '.join(_named(task) for task in absent)} to {self._what}"


class Membership:
    """The ranks of an elastic simulation that are left, as far as they know.

    Args:
        scheduler: tells of deaths.
        mail: of all ranks.
        wires: tell how long a decision takes.
        notice_seconds: how long after a death, or the beginning of a repair, the others are told.
        local_size: ranks per node when the simulation began.
        chance: decides who is told of a death, where real engines differ.
    """

    def __init__(
        self, scheduler: Scheduler, mail: Mail, wires: Wires, notice_seconds: float, local_size: int, chance: Random
    ) -> None:
        self._scheduler, self._mail, self._wires = scheduler, mail, wires
        self._notice_seconds, self._local_size, self._chance = notice_seconds, local_size, chance
        self._transports: list[ElasticTransport] = []
        self._begin([])
        scheduler.on_death(self._mourn)

    def join(self, transport: "ElasticTransport") -> None:
        """One more rank, before the simulation begins."""
        self._transports.append(transport)

    def begin(self) -> None:
        """All ranks have joined."""
        self._begin(self._scheduler.tasks)
        for transport in self._transports:
            transport.take_seat()

    def _begin(self, members: Sequence[Task]) -> None:
        self.members = list(members)
        self.collectives = Collectives(self._scheduler, self._wires, self.members, self._chance)
        self._dead: dict[int, str] = {}
        self._ended: str | None = None
        self._is_broken = False
        self._voted: dict[int, int] = {}
        self._votes: dict[int, _Assembly] = {}
        self._repair: _Assembly | None = None

    @property
    def living(self) -> list[Task]:
        """Members that are not known to be dead."""
        return [task for task in self.members if task.rank not in self._dead]

    def seat(self, task: Task) -> tuple[int, int, int, int]:
        """Rank, size, local rank and local size of a member."""
        same_node = [other for other in self.members if other.rank // self._local_size == task.rank // self._local_size]
        return self.members.index(task), len(self.members), same_node.index(task), len(same_node)

    def exchange(
        self, task: Task, sends: Sequence[Message], receives: Sequence[Message], tag: int
    ) -> SimulatedExchange:
        """As ``Mail.exchange``, but with members, who may be dead."""
        if self._ended is not None:
            raise RankLostError(self._ended)
        to, source = ([(self._member(peer), array) for peer, array in messages] for messages in (sends, receives))
        request = self._mail.exchange(task, to, source, tag)
        peers = {rank for rank, _ in (*to, *source)}
        self._mail.watch(request, peers)
        for rank in peers & self._dead.keys():
            request.drop_non_finite(self._dead[rank], task.clock)
        return request

    def number(self, peer: int) -> int:
        """The number at the start of the simulation of a rank of now."""
        return self._member(peer)

    def _member(self, peer: int) -> int:
        check_rank(peer, len(self.members), "exchange with")
        return self.members[peer].rank

    def vote(self, task: Task, yes: bool) -> bool:
        """As ``Elastic.vote``."""
        self._scheduler.check_alive(task)
        number = self._voted.get(task.rank, 0)
        self._voted[task.rank] = number + 1
        vote = self._votes.setdefault(number, _Assembly(self, f"vote (number {number})"))
        vote.come[task.rank] = task
        if not yes:
            self._break(f"rank {self.members.index(task)} has voted no: call repair(), too", task.clock)
        self._settle_vote(vote, task.clock)
        self._stay(task, vote)
        return vote.verdict

    def repair(self, task: Task) -> list[int]:
        """As ``Elastic.repair``."""
        self._scheduler.check_alive(task)
        if self._repair is None:
            self._repair = _Assembly(self, "repair")
            self._break(f"rank {self.members.index(task)} has begun a repair: call repair(), too", task.clock)
        repair = self._repair
        repair.come[task.rank] = task
        self._settle_repair(repair, task.clock)
        self._stay(task, repair)
        return list(repair.survivors)

    def _stay(self, task: Task, assembly: _Assembly) -> None:
        if assembly.is_over:
            self._scheduler.advance(task, max(task.clock, assembly.end_seconds))
        else:
            self._scheduler.block(task, assembly)

    def _mourn(self, task: Task, time: float) -> None:
        self._scheduler.at(time + self._notice_seconds, lambda now: self._notice(task, now))

    def _notice(self, task: Task, now: float) -> None:
        if task not in self.members:
            return
        why = self._dead[task.rank] = f"{_named(task)} {task.ended}: call repair()"
        self._mail.drop_non_finite(task, why, now)
        self.collectives.drop_non_finite(task, why, now)
        for vote in self._votes.values():
            self._settle_vote(vote, now)
        if self._repair is not None:
            self._settle_repair(self._repair, now)

    def _break(self, why: str, now: float) -> None:
        """Nothing goes on before all have repaired."""
        if not self._is_broken:
            self._is_broken = True
            for vote in self._votes.values():
                self._settle_vote(vote, now)
            members = self.members
            self._scheduler.at(now + self._notice_seconds, lambda then: self._end(members, why, then))

    def _end(self, members: Sequence[Task], why: str, now: float) -> None:
        if members is self.members and self._ended is None:
            self._ended = why
            self._mail.end(why, now)
            self.collectives.end(why, now)

    def _settle_vote(self, vote: _Assembly, now: float) -> None:
        """Decide, if all have voted; or if one says no, or repairs, which will not vote."""
        if not vote.is_over and (self._is_broken or self._all_have_come(vote)):
            vote.verdict = not self._is_broken and not any(task.died for task in self.members)
            self._close(vote, now)

    def _settle_repair(self, repair: _Assembly, now: float) -> None:
        if repair.is_over or not self._all_have_come(repair):
            return
        self._end(self.members, "repaired", now)
        before = self.members
        living = self.living
        repair.survivors = [before.index(task) for task in living]
        self._close(repair, now)
        self._begin(living)
        for task in living:
            self._transports[task.rank].take_seat()

    def _all_have_come(self, assembly: _Assembly) -> bool:
        return all(task.rank in assembly.come for task in self.living)

    def _close(self, assembly: _Assembly, now: float) -> None:
        assembly.is_over = True
        assembly.end_seconds = now + self._wires.collective_seconds("barrier", 0)
        for task in assembly.come.values():
            if task.waiting is assembly:
                self._scheduler.wake(task, assembly.end_seconds)


class ElasticTransport(SimulatedTransport):
    """The transport of a virtual rank that goes on when others die; see ``simulate``."""

    _crew: Membership

    def join(self, crew: Membership) -> None:
        """Say who goes on with whom. Called once, before it runs."""
        self._crew = crew
        crew.join(self)

    def take_seat(self) -> None:
        """Be the rank that the crew says, among those that are left."""
        self.rank, self.size, self.local_rank, self.local_size = self._crew.seat(self._task)
        self._collectives = self._crew.collectives

    def vote(self, yes: bool) -> bool:
        """As ``Elastic.vote``."""
        self._begin_collective()
        return self._crew.vote(self._task, yes)

    def repair(self) -> list[int]:
        """As ``Elastic.repair``."""
        self._pause()
        if self._faults.dies_in_repair():
            self._die_while_waiting()
        return self._crew.repair(self._task)

    def _task_number(self, peer: int) -> int:
        return self._crew.number(peer)

    def _post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> SimulatedExchange:
        return self._crew.exchange(self._task, sends, receives, tag)


def _named(task: Task) -> str:
    return f"rank {task.rank} of the start"
