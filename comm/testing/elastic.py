"""``check_elastic``: what a transport must do whose ranks go on when others die."""

from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import numpy as np

from lentando.comm.capabilities import Elastic
from lentando.comm.errors import RankLostError, TransportError
from lentando.comm.transport import Array, Transport

__all__ = ["check_elastic"]

MOST_REPAIRS = 8
"""So many repairs in a row must be enough, where at most two ranks die."""


class _ElasticTransport(Transport, Elastic, Protocol):
    """What is checked."""


def check_elastic(transport: _ElasticTransport, die: Callable[[], NoReturn]) -> None:
    """Check that ``transport`` keeps every promise of the ``Elastic`` protocol. Called by all ranks together.

    All but one of the ranks die in it, and only that one returns: with 7 ranks or more each promise is checked, with
    fewer as many as ranks suffice for. A rank that finds a promise broken raises at once; one that waits forever breaks
    one, too. So the caller has to end the job, and to limit its time.

    Args:
        transport: open, with no exchange under way.
        die: ends this rank as a crash would: ``os.kill(os.getpid(), signal.SIGKILL)``.

    Raises:
        AssertionError: says which promise is broken, on which rank.
    """
    _ElasticCheck(transport, die).run()


class _ElasticCheck:
    def __init__(self, transport: _ElasticTransport, die: Callable[[], NoReturn]) -> None:
        self.transport = transport
        self.die = die
        self.identity = transport.rank
        self.members = list(range(transport.size))

    def run(self) -> None:
        self.holds(isinstance(self.transport, Elastic), "it lacks a method of the protocol")
        self.works("before anything happens")
        for check, deaths in (
            (self.votes, 0),
            (self.repair_that_nobody_needs, 0),
            (self.repair_wakes_who_waits_for_a_message, 0),
            (self.repair_wakes_who_waits_in_a_collective, 0),
            (self.no_wakes_who_waits, 0),
            (self.messages_under_way_are_gone, 0),
            (self.death_of_the_last_while_others_wait_for_it, 1),
            (self.death_of_the_first_in_collectives, 1),
            (self.death_instead_of_a_vote, 1),
            (self.death_instead_of_a_repair, 2),
            (self.death_of_all_others, len(self.members)),
        ):
            if deaths < self.transport.size or check == self.death_of_all_others:
                try:
                    check()
                except RankLostError as error:
                    name = check.__name__.replace("_", " ")
                    raise AssertionError(
                        f"{self.who()}: {name}: a RankLostError that nothing asks for: {error}"
                    ) from error
                self.works(f"after the {check.__name__.replace('_', ' ')}")

    def votes(self) -> None:
        self.holds(self.transport.vote(True), "all voted yes, but the vote is no")
        for contrary in range(self.transport.size):
            verdict = self.transport.vote(self.transport.rank != contrary)
            self.holds(not verdict, f"rank {contrary} voted no, but the vote is yes")
            self.repaired([])  # what follows a vote that failed

    def repair_that_nobody_needs(self) -> None:
        self.repaired([])

    def repair_wakes_who_waits_for_a_message(self) -> None:
        if self.transport.rank:
            for _ in range(2):  # the first may have been waiting already; the second finds the repair begun
                self.raises(self.wait_for_previous, "a receive that nobody sends to, while rank 0 repairs")
        self.repaired([])

    def repair_wakes_who_waits_in_a_collective(self) -> None:
        if self.transport.rank:
            for _ in range(2):
                self.raises(self.transport.barrier, "a barrier, while rank 0 repairs")
            self.holds(not self.transport.vote(True), "rank 0 repairs, but the vote is yes")
        self.repaired([])

    def no_wakes_who_waits(self) -> None:
        last = self.transport.size - 1
        if self.transport.rank < last:
            self.raises(self.wait_for_previous, f"a receive that nobody sends to, while rank {last} has voted no")
        self.holds(not self.transport.vote(self.transport.rank != last), f"rank {last} voted no, but the vote is yes")
        self.repaired([])

    def messages_under_way_are_gone(self) -> None:
        following = (self.transport.rank + 1) % self.transport.size
        self.transport.exchange([(following, np.full(3, -1.0))], [], tag=5)
        self.holds(self.transport.vote(True), "a message is under way that nobody receives, and the vote is no")
        self.repaired([])
        received = np.zeros(3)
        previous = (self.transport.rank - 1) % self.transport.size
        following = (self.transport.rank + 1) % self.transport.size
        sent = np.full(3, float(self.transport.rank))
        self.transport.exchange([(following, sent)], [(previous, received)], tag=5).wait()
        self.holds(bool((received == previous).all()), f"received {received}, sent before the repair")

    def death_of_the_last_while_others_wait_for_it(self) -> None:
        last = self.transport.size - 1
        if self.transport.rank == last:
            self.die()
        for _ in range(2):
            self.raises(
                lambda: self.transport.exchange([], [(last, np.empty(3))]).wait(), "a receive from a rank that is dead"
            )
        self.holds(not self.transport.vote(True), f"rank {last} is dead, but the vote is yes")
        self.repaired([last])

    def death_of_the_first_in_collectives(self) -> None:
        for operation in (
            lambda: self.transport.allreduce(np.ones(4)),
            lambda: self.transport.broadcast(np.ones(4), self.transport.size - 1),
            lambda: self.transport.allgather(np.ones(4)),
        ):
            if self.transport.size == 1:
                return
            if self.transport.rank == 0:
                self.die()
            told = False
            try:
                operation()
            except RankLostError:
                told = True
            self.holds(not self.transport.vote(True), "a rank died in a collective, but the vote is yes")
            self.repaired([0])
            somebody = self.transport.allgather(np.array([told])).any()
            self.holds(bool(somebody), "a rank is dead that a collective needs, but nobody was told")
            if self.transport.size < 4:  # leave some for the others
                return

    def death_instead_of_a_vote(self) -> None:
        dying = self.transport.size // 2
        if self.transport.rank == dying:
            self.die()
        verdicts = [self.transport.vote(True) for _ in range(2)]
        self.holds(not any(verdicts), f"rank {dying} died instead of voting, but the vote is yes")
        self.repaired([dying])

    def death_instead_of_a_repair(self) -> None:
        """Rank 0 dies, and the last when others may be in the repair already."""
        last = self.transport.size - 1
        if self.transport.rank == 0:
            self.die()
        if self.transport.rank == last:
            self.raises(lambda: self.transport.exchange([], [(0, np.empty(1))]).wait(), "a receive from a dead rank")
            self.die()
        self.repaired([0, last])

    def death_of_all_others(self) -> None:
        survivor = self.transport.size // 2
        if self.transport.rank != survivor:
            self.die()
        self.repaired([rank for rank in range(self.transport.size) if rank != survivor])

    def repaired(self, dead: Sequence[int]) -> None:
        """Repair until all that live are in order. Nobody but ``dead`` is missing then."""
        expected = [member for rank, member in enumerate(self.members) if rank not in dead]
        for _ in range(MOST_REPAIRS):
            survivors = self.transport.repair()
            self.holds(
                survivors == sorted(set(survivors)), f"repair() returned {survivors}: not in the order of before"
            )
            self.members = [self.members[rank] for rank in survivors]
            self.holds(
                self.members[self.transport.rank : self.transport.rank + 1] == [self.identity]
                and self.transport.size == len(self.members),
                f"repair() returned {survivors}, but this is rank {self.transport.rank} of {self.transport.size} now, "
                f"and was rank {self.identity} at first",
            )
            if self.members == expected and self.transport.vote(True):
                return
        self.holds(False, f"after {MOST_REPAIRS} repairs ranks {self.members} are left, expected {expected}")

    def works(self, when: str) -> None:
        """Everything goes on among those that are left."""
        transport, rank, size = self.transport, self.transport.rank, self.transport.size
        gathered = transport.allgather(np.array([self.identity]))[:, 0].tolist()
        self.holds(gathered == self.members, f"{when}, allgather is of ranks {gathered}, expected {self.members}")
        total: Array = np.array([float(self.identity)])
        transport.allreduce(total)
        self.holds(float(total[0]) == sum(self.members), f"{when}, allreduce gives {total[0]}")
        for root in range(size):
            array = np.array([self.identity])
            transport.broadcast(array, root)
            self.holds(int(array[0]) == self.members[root], f"{when}, broadcast from rank {root} gives {array[0]}")
        for distance in range(1, size):
            received = np.zeros(1, np.int64)
            to, source = (rank + distance) % size, (rank - distance) % size
            transport.exchange([(to, np.array([self.identity]))], [(source, received)]).wait()
            self.holds(int(received[0]) == self.members[source], f"{when}, rank {source} sent {received[0]}")
        self.holds(
            0 <= transport.local_rank < transport.local_size <= size,
            f"{when}, local rank {transport.local_rank} of {transport.local_size} on the node, {size} in all",
        )
        transport.barrier()
        self.holds(transport.vote(True), f"{when}, all vote yes, but the vote is no")

    def wait_for_previous(self) -> None:
        previous = (self.transport.rank - 1) % self.transport.size
        self.transport.exchange([], [(previous, np.empty(2))], tag=7).wait()

    def raises(self, action: Callable[[], object], what: str) -> None:
        try:
            action()
        except RankLostError:
            return
        except TransportError as error:
            raise AssertionError(f"{self.who()}: {what}: expected RankLostError, got {type(error).__name__}") from error
        self.holds(False, f"{what}: expected RankLostError, nothing was raised")

    def holds(self, claim: bool, otherwise: str) -> None:
        if not claim:
            raise AssertionError(f"{self.who()}: {otherwise}")

    def who(self) -> str:
        transport = self.transport
        return f"transport {transport.name!r} on rank {transport.rank} of {transport.size} ({self.identity} at first)"
