"""Exchanges with neighbours, waited for as long as the neighbours can still take part in them."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from lentando.comm.agreement import Event, Intent, agree
from lentando.comm.capabilities import Elastic, Notices, TimedRequest
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import MismatchError, ranks_in_words
from lentando.comm.notices import watch_neighbors
from lentando.comm.transport import Request, Transport

__all__ = ["NeighborExchanges", "in_gossip"]

LOOK_SECONDS = 0.25
"""After each so many seconds of waiting, a rank reads the notices of its neighbours."""


class NeighborExchanges:
    """Counts the exchanges of one rank with its neighbours, and waits for them.

    Made by all ranks after the same control message. All ranks begin the same exchanges in the same order.

    Args:
        transport: that exchanges the messages.
        ranks: neighbours in either direction.
    """

    def __init__(self, transport: Transport, ranks: Iterable[int]) -> None:
        self._transport = transport
        self._neighbors = watch_neighbors(transport, ranks)

    def begin(self) -> int:
        """This rank is about to begin an exchange: its number, counted from 1 for all optimizers together."""
        if self._neighbors is None:
            return 0
        self._neighbors.begun += 1
        return self._neighbors.begun

    def wait(
        self, request: Request, exchange: int, ranks: Sequence[int], doing: Callable[[Sequence[int]], str]
    ) -> None:
        """Wait until an exchange is complete.

        Args:
            request: the exchange, or a part of it.
            exchange: its number.
            ranks: whose messages, or whose receiving of messages, it waits for.
            doing: says in words what this rank is doing, given the ranks that will not take part.

        Raises:
            MismatchError: on every rank, if one of these ranks has ended its steps, or waits for all ranks elsewhere.
            TransportError: as ``Request.wait``.
        """
        neighbors = self._neighbors
        if neighbors is None:
            request.wait()
            return
        timed = cast(TimedRequest, request)  # as those of a transport with notices are
        notices = cast(Notices, self._transport)
        absent = neighbors.known_elsewhere(ranks, exchange)
        while not absent and not timed.wait_for(LOOK_SECONDS):
            absent = neighbors.waiting_elsewhere(notices, ranks, exchange)
        if absent:
            neighbors.abandoned.append(request)
            self._disagree(lambda: doing(absent))

    def _disagree(self, doing: Callable[[], str]) -> None:
        """Come to the control message in which the others wait, as a rank that is about to do something else."""
        transport = self._transport
        try:
            agree(transport, Intent(Event.GOSSIP), doing)
        except MismatchError:
            if is_elastic(transport):  # the others vote on what they have attempted
                assert isinstance(transport, Elastic)
                transport.vote(True)
            raise
        raise MismatchError(f"rank {transport.rank} {doing()}")  # not reached: no other rank is in gossip's message


def in_gossip(ranks: Sequence[int], number: int, *, sending: bool) -> str:
    """What a rank is doing that waits for these ranks in gossip step ``number``, counted from 1."""
    others = ranks_in_words(ranks)
    return f"waits in gossip step {number} " + (
        f"for {others} to receive its message" if sending else f"for a message of {others}"
    )
