"""``check_elastic``: the conformance suite of transports whose ranks continue when others die."""

from collections.abc import Callable, Sequence
from typing import NoReturn, Protocol

import numpy as np

from lentando.comm.capabilities import Elastic
from lentando.comm.errors import RankLostError, TransportError
from lentando.comm.transport import Array, Transport

__all__ = ["check_elastic"]

MOST_REPAIRS = 8
"""Limit of repairs in a row, among which at most two ranks die."""


class _ElasticTransport(Transport, Elastic, Protocol):
    """A transport with the ``Elastic`` protocol."""


def check_elastic(transport: _ElasticTransport, die: Callable[[], NoReturn]) -> None:
    """Check that a transport keeps every promise of the ``Elastic`` protocol. All ranks call it together.

    All ranks but one die during the checks, and only that rank returns. With fewer than 7 ranks, some promises are not
    checked. A rank that finds a broken promise raises an error at once, and a broken promise may also show as a wait
    that never ends. So the caller must end the job, and limit its time.

    Args:
        transport: open transport without an exchange in flight.
        die: function that ends this rank like a crash: ``os.kill(os.getpid(), signal.SIGKILL)``.

    Raises:
        AssertionError: if a promise is broken; names the promise and the rank.
    """
    _ElasticSuite(transport, die).run()


class _ElasticSuite:
    """The checks of ``check_elastic``, one per method."""

    def __init__(self, transport: _ElasticTransport, die: Callable[[], NoReturn]) -> None:
        self.transport = transport
        self.die = die
        self.identity = transport.rank
        self.members = list(range(transport.size))

    def run(self) -> None:
        self.require(isinstance(self.transport, Elastic), "it lacks a method of the protocol")
        self.require_works("before anything happens")
        for check, deaths in (
            (self.votes, 0),
            (self.repair_without_a_death, 0),
            (self.repair_ends_waits_for_messages, 0),
            (self.repair_ends_waits_in_collectives, 0),
            (self.negative_vote_ends_waits, 0),
            (self.messages_in_flight_are_discarded, 0),
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
                    raise AssertionError(f"{self.label()}: {name}: unexpected RankLostError: {error}") from error
                self.require_works(f"after the {check.__name__.replace('_', ' ')}")

    def votes(self) -> None:
        self.require(self.transport.vote(True), "all voted yes, but the vote is no")
        for contrary in range(self.transport.size):
            verdict = self.transport.vote(self.transport.rank != contrary)
            self.require(not verdict, f"rank {contrary} voted no, but the vote is yes")
            self.require_repair([])  # a negative vote is always followed by a repair

    def repair_without_a_death(self) -> None:
        self.require_repair([])

    def repair_ends_waits_for_messages(self) -> None:
        if self.transport.rank:
            for _ in range(2):  # the first may begin before the repair, the second begins after it
                self.require_rank_lost(self.wait_for_previous, "a receive without a message, while rank 0 repairs")
        self.require_repair([])

    def repair_ends_waits_in_collectives(self) -> None:
        if self.transport.rank:
            for _ in range(2):
                self.require_rank_lost(self.transport.barrier, "a barrier, while rank 0 repairs")
            self.require(not self.transport.vote(True), "rank 0 repairs, but the vote is yes")
        self.require_repair([])

    def negative_vote_ends_waits(self) -> None:
        last = self.transport.size - 1
        if self.transport.rank < last:
            self.require_rank_lost(
                self.wait_for_previous, f"a receive without a message, while rank {last} has voted no"
            )
        self.require(not self.transport.vote(self.transport.rank != last), f"rank {last} voted no, but the vote is yes")
        self.require_repair([])

    def messages_in_flight_are_discarded(self) -> None:
        following = (self.transport.rank + 1) % self.transport.size
        self.transport.exchange([(following, np.full(3, -1.0))], [], tag=5)
        self.require(self.transport.vote(True), "a message in flight is never received, and the vote is no")
        self.require_repair([])
        received = np.zeros(3)
        previous = (self.transport.rank - 1) % self.transport.size
        following = (self.transport.rank + 1) % self.transport.size
        sent = np.full(3, float(self.transport.rank))
        self.transport.exchange([(following, sent)], [(previous, received)], tag=5).wait()
        self.require(bool((received == previous).all()), f"received {received}, sent before the repair")

    def death_of_the_last_while_others_wait_for_it(self) -> None:
        last = self.transport.size - 1
        if self.transport.rank == last:
            self.die()
        for _ in range(2):
            self.require_rank_lost(
                lambda: self.transport.exchange([], [(last, np.empty(3))]).wait(), "a receive from a rank that is dead"
            )
        self.require(not self.transport.vote(True), f"rank {last} is dead, but the vote is yes")
        self.require_repair([last])

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
            has_error = False
            try:
                operation()
            except RankLostError:
                has_error = True
            self.require(not self.transport.vote(True), "a rank died in a collective, but the vote is yes")
            self.require_repair([0])
            has_error_anywhere = self.transport.allgather(np.array([has_error])).any()
            # The next to die may be the first that has received all, and has not sent all yet: a vote waits for all.
            self.require(
                self.transport.vote(bool(has_error_anywhere)),
                "a rank died in a collective, but no rank got a RankLostError",
            )
            if self.transport.size < 4:  # the remaining checks need ranks, too
                return

    def death_instead_of_a_vote(self) -> None:
        dying = self.transport.size // 2
        if self.transport.rank == dying:
            self.die()
        verdicts = [self.transport.vote(True) for _ in range(2)]
        self.require(not any(verdicts), f"rank {dying} died instead of voting, but the vote is yes")
        self.require_repair([dying])

    def death_instead_of_a_repair(self) -> None:
        """Let rank 0 die, and then the last rank, when others may be in the repair already."""
        last = self.transport.size - 1
        if self.transport.rank == 0:
            self.die()
        if self.transport.rank == last:
            self.require_rank_lost(
                lambda: self.transport.exchange([], [(0, np.empty(1))]).wait(), "a receive from a dead rank"
            )
            self.die()
        self.require_repair([0, last])

    def death_of_all_others(self) -> None:
        survivor = self.transport.size // 2
        if self.transport.rank != survivor:
            self.die()
        self.require_repair([rank for rank in range(self.transport.size) if rank != survivor])

    def require_repair(self, dead: Sequence[int]) -> None:
        """Repair until the members agree that exactly the ranks ``dead`` are missing."""
        expected = [member for rank, member in enumerate(self.members) if rank not in dead]
        for _ in range(MOST_REPAIRS):
            survivors = self.transport.repair()
            self.require(
                survivors == sorted(set(survivors)), f"repair() returned {survivors}: not in the previous order"
            )
            self.members = [self.members[rank] for rank in survivors]
            self.require(
                self.members[self.transport.rank : self.transport.rank + 1] == [self.identity]
                and self.transport.size == len(self.members),
                f"repair() returned {survivors}, but this is rank {self.transport.rank} of {self.transport.size} now, "
                f"and was rank {self.identity} at first",
            )
            if self.members == expected and self.transport.vote(True):
                return
        self.require(False, f"after {MOST_REPAIRS} repairs ranks {self.members} are left, expected {expected}")

    def require_works(self, when: str) -> None:
        """Check that all operations work among the ranks that are left."""
        transport, rank, size = self.transport, self.transport.rank, self.transport.size
        gathered = transport.allgather(np.array([self.identity]))[:, 0].tolist()
        self.require(gathered == self.members, f"{when}, allgather is of ranks {gathered}, expected {self.members}")
        total: Array = np.array([float(self.identity)])
        transport.allreduce(total)
        self.require(float(total[0]) == sum(self.members), f"{when}, allreduce gives {total[0]}")
        for root in range(size):
            array = np.array([self.identity])
            transport.broadcast(array, root)
            self.require(int(array[0]) == self.members[root], f"{when}, broadcast from rank {root} gives {array[0]}")
        for distance in range(1, size):
            received = np.zeros(1, np.int64)
            destination, source = (rank + distance) % size, (rank - distance) % size
            transport.exchange([(destination, np.array([self.identity]))], [(source, received)]).wait()
            self.require(int(received[0]) == self.members[source], f"{when}, rank {source} sent {received[0]}")
        self.require(
            0 <= transport.local_rank < transport.local_size <= size,
            f"{when}, local rank {transport.local_rank} of {transport.local_size} on the node, {size} in all",
        )
        transport.barrier()
        self.require(transport.vote(True), f"{when}, all vote yes, but the vote is no")

    def wait_for_previous(self) -> None:
        previous = (self.transport.rank - 1) % self.transport.size
        self.transport.exchange([], [(previous, np.empty(2))], tag=7).wait()

    def require_rank_lost(self, action: Callable[[], object], description: str) -> None:
        try:
            action()
        except RankLostError:
            return
        except TransportError as error:
            raise AssertionError(
                f"{self.label()}: {description}: expected RankLostError, got {type(error).__name__}"
            ) from error
        self.require(False, f"{description}: expected RankLostError, nothing was raised")

    def require(self, condition: bool, failure: str) -> None:
        if not condition:
            raise AssertionError(f"{self.label()}: {failure}")

    def label(self) -> str:
        transport = self.transport
        return f"transport {transport.name!r} on rank {transport.rank} of {transport.size} ({self.identity} at first)"
