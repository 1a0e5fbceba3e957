"""Notices: a rank that waits for a neighbour's message learns when that neighbour waits for it somewhere else.

Ranks that gossip exchange messages without control messages. If one of them has ended its steps, or evaluates while the
others still train, it waits in a control message that needs all ranks, and its neighbours wait for messages that it
will never send. So a rank that comes to a control message leaves each of its neighbours a notice of how many exchanges
it has begun. A neighbour that comes to the same control message takes the notice there. One that has waited in vain for
a while reads it, and knows whether its message will come.

Every notice of a control message is taken in that same control message, so that none is ever mistaken for another.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lentando.comm.capabilities import Notices
from lentando.comm.job import job_of
from lentando.comm.transport import Request, Transport

__all__ = [
    "Neighbors",
    "count_optimizer",
    "exchanges_begun",
    "forget_neighbors",
    "neighbors_of",
    "optimizers_of",
    "watch_neighbors",
]


class Neighbors:
    """The ranks with which this rank exchanges messages outside collectives, and what they have left for it.

    Attributes:
        begun: exchanges that this rank has begun.
        abandoned: exchanges that will never be complete, whose arrays the engine may still write to.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.abandoned: list[Request] = []
        self._ranks: set[int] = set()
        self._read: dict[int, int] = {}

    def add(self, ranks: Iterable[int]) -> None:
        """Exchange messages with these ranks, too. Each of them adds this rank at the same control message."""
        self._ranks.update(ranks)

    def announce(self, transport: Notices) -> None:
        """This rank comes to a control message: leave each neighbour a notice."""
        for rank in self._ranks:
            transport.leave_notice(rank, self.begun)

    def settle(self, transport: Notices, announced: Collection[int]) -> None:
        """All ranks have come to the control message: take the notices that these ranks have left."""
        for rank in self._ranks.intersection(announced):
            if self._read.pop(rank, None) is None:
                transport.take_notice(rank)

    def waiting_elsewhere(self, transport: Notices, ranks: Collection[int], exchange: int) -> list[int]:
        """Those of these ranks that wait in a control message and have not begun this exchange: they never will.

        Args:
            transport: of the job.
            ranks: neighbours.
            exchange: number of an exchange of this rank, counted from 1.
        """
        for rank in self._ranks - self._read.keys():
            begun = transport.read_notice(rank)
            if begun is not None:
                self._read[rank] = begun
        return self.known_elsewhere(ranks, exchange)

    def known_elsewhere(self, ranks: Collection[int], exchange: int) -> list[int]:
        """As ``waiting_elsewhere``, by the notices that were read before."""
        if not self._read:
            return []
        return [rank for rank in ranks if self._read.get(rank, exchange) < exchange]


@dataclass
class _OptimizerCount:
    """Number of optimizers that were made over one transport."""

    number: int = 0


def watch_neighbors(transport: Transport, ranks: Iterable[int]) -> Neighbors | None:
    """From now on, this rank exchanges messages with these ranks. All ranks call it after the same control message.

    Args:
        transport: of the job.
        ranks: neighbours in either direction; this rank itself does not count.

    Returns:
        None if the transport has no notices.
    """
    if transport.size == 1 or not isinstance(transport, Notices):
        return None
    neighbors = job_of(transport).get(Neighbors)
    neighbors.add(rank for rank in ranks if rank != transport.rank)
    return neighbors


def neighbors_of(transport: Transport) -> Neighbors | None:
    """What ``watch_neighbors`` has returned last, None before."""
    return job_of(transport).find(Neighbors)


def forget_neighbors(transport: Transport) -> None:
    """The ranks are numbered again, and all messages are gone: begin without neighbours."""
    job_of(transport).drop(Neighbors)


def count_optimizer(transport: Transport) -> None:
    """One more optimizer is made over this transport."""
    job_of(transport).get(_OptimizerCount).number += 1


def optimizers_of(transport: Transport) -> int:
    """How many optimizers were made over this transport."""
    return job_of(transport).get(_OptimizerCount).number


def exchanges_begun(transport: Transport) -> int:
    """How many exchanges with neighbours this rank has begun."""
    neighbors = neighbors_of(transport)
    return 0 if neighbors is None else neighbors.begun
