"""Notices: a rank that waits for a neighbour's message can find out that the neighbour will never send it.

Ranks that gossip exchange messages without control messages. A rank that has ended its steps, or that evaluates while
the others still train, waits in a control message that needs all ranks, and its neighbours wait for messages that it
will never send. Each rank that reaches a control message therefore leaves each of its neighbours a notice with the
number of exchanges that it has begun. A neighbour that reaches the same control message removes the notice. A neighbour
that has waited for a message for a while reads the notice, which shows whether the message can still arrive.

Every notice of a control message is removed in that same control message, so one notice is never mistaken for another.
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
    "optimizers_of",
    "watch_neighbors",
]


class Neighbors:
    """The ranks with which this rank exchanges messages outside collectives, and the notices that they have left.

    Attributes:
        begun: number of exchanges that this rank has begun.
        abandoned: exchanges that will never be complete, kept because MPI may still write to their arrays.
    """

    def __init__(self) -> None:
        self.begun = 0
        self.abandoned: list[Request] = []
        self._ranks: set[int] = set()
        self._read: dict[int, int] = {}

    def add(self, ranks: Iterable[int]) -> None:
        """Add ranks with which messages are exchanged. Each of them adds this rank after the same control message."""
        self._ranks.update(ranks)

    def announce(self, transport: Notices) -> None:
        """Leave each neighbour a notice. Called when this rank reaches a control message."""
        for rank in self._ranks:
            transport.leave_notice(rank, self.begun)

    def settle(self, transport: Notices, announced: Collection[int]) -> None:
        """Remove the notices of a control message that all ranks have reached.

        Args:
            transport: transport of the job.
            announced: ranks that have left notices.
        """
        for rank in self._ranks.intersection(announced):
            if self._read.pop(rank, None) is None:
                transport.take_notice(rank)

    def waiting_elsewhere(self, transport: Notices, ranks: Collection[int], exchange: int) -> list[int]:
        """Return the ranks that wait in a control message and have not begun this exchange: they never will.

        Args:
            transport: transport of the job.
            ranks: neighbours to check.
            exchange: number of an exchange of this rank, counted from 1.
        """
        for rank in self._ranks - self._read.keys():
            begun = transport.read_notice(rank)
            if begun is not None:
                self._read[rank] = begun
        return self.known_elsewhere(ranks, exchange)

    def known_elsewhere(self, ranks: Collection[int], exchange: int) -> list[int]:
        """Return the same ranks as ``waiting_elsewhere``, judging only by notices that were read before."""
        if not self._read:
            return []
        return [rank for rank in ranks if self._read.get(rank, exchange) < exchange]


@dataclass
class _OptimizerCount:
    """Number of optimizers that were made over one transport."""

    number: int = 0


def watch_neighbors(transport: Transport, ranks: Iterable[int]) -> Neighbors | None:
    """Register ranks with which this rank exchanges messages. All ranks call it after the same control message.

    Args:
        transport: transport of the job.
        ranks: neighbours in either direction; this rank itself is ignored.

    Returns:
        All neighbours so far; None if the transport has no notices.
    """
    if transport.size == 1 or not isinstance(transport, Notices):
        return None
    neighbors = job_of(transport).get(Neighbors)
    neighbors.add(rank for rank in ranks if rank != transport.rank)
    return neighbors


def forget_neighbors(transport: Transport) -> None:
    """Remove all neighbours, after the ranks were renumbered and all messages were dropped."""
    job_of(transport).drop(Neighbors)


def count_optimizer(transport: Transport) -> None:
    """Count an optimizer that is made over this transport."""
    job_of(transport).get(_OptimizerCount).number += 1


def optimizers_of(transport: Transport) -> int:
    """Return how many optimizers were made over this transport."""
    return job_of(transport).get(_OptimizerCount).number


def exchanges_begun(transport: Transport) -> int:
    """Return how many exchanges with neighbours this rank has begun."""
    neighbors = job_of(transport).find(Neighbors)
    return 0 if neighbors is None else neighbors.begun
