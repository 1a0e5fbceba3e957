"""Exchanges with neighbours: a rank waits for them as long as the neighbours can still take part."""

from collections.abc import Callable, Iterable, Sequence
from typing import cast

from lentando.comm.agreement import Event, Intent, agree
from lentando.comm.capabilities import Elastic, Notices, TimedRequest
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import MismatchError
from lentando.comm.notices import watch_neighbors
from lentando.comm.numbering import in_words, number_of
from lentando.comm.transport import Request, Transport

__all__ = ["NeighborExchanges", "in_gossip"]

NOTICE_SECONDS = 0.25
"""A waiting rank reads the notices of its neighbours each time this many seconds have passed."""


class NeighborExchanges:
    """Counts the exchanges of one rank with its neighbours, and waits for them.

    Made by all ranks after the same control message. All ranks begin the same exchanges in the same order.

    Args:
        transport: transport that exchanges the messages.
        ranks: neighbours in either direction.
    """

    def __init__(self, transport: Transport, ranks: Iterable[int]) -> None:
        self._transport = transport
        self._neighbors = watch_neighbors(transport, ranks)

    def begin(self) -> int:
        """Count an exchange that begins, and return its number, from 1 for all optimizers together."""
        if self._neighbors is None:
            return 0
        self._neighbors.begun += 1
        return self._neighbors.begun

    def wait(
        self, request: Request, exchange: int, ranks: Sequence[int], describe: Callable[[Sequence[int]], str]
    ) -> None:
        """Wait until an exchange is complete.

        Args:
            request: request of the exchange, or of a part of it.
            exchange: number of the exchange.
            ranks: neighbours that send the messages, or receive them.
            describe: returns what this rank is doing in words, given the ranks that will not take part.

        Raises:
            MismatchError: on every rank, if one of these ranks has ended its steps, or waits for all ranks elsewhere.
            TransportError: as ``Request.wait``.
        """
        neighbors = self._neighbors
        if neighbors is None:
            request.wait()
            return
        timed = cast(TimedRequest, request)  # the requests of a transport with notices are timed
        notices = cast(Notices, self._transport)
        absent = neighbors.known_elsewhere(ranks, exchange)
        while not absent and not timed.wait_for(NOTICE_SECONDS):
            absent = neighbors.waiting_elsewhere(notices, ranks, exchange)
        if absent and not request.test():  # a rank may have done its part just before it left its notice
            neighbors.abandoned.append(request)
            self._disagree(lambda: describe(absent))

    def _disagree(self, describe: Callable[[], str]) -> None:
        """Take part in the control message in which the other ranks wait, so that all of them get an error."""
        transport = self._transport
        try:
            agree(transport, Intent(Event.GOSSIP), describe)
        except MismatchError:
            if is_elastic(transport):  # the other ranks vote on their attempt
                assert isinstance(transport, Elastic)
                transport.vote(True)
            raise
        # Not reached: no other rank is in gossip's control message.
        raise MismatchError(f"rank {number_of(transport)} {describe()}")


def in_gossip(transport: Transport, ranks: Sequence[int], number: int, *, sending: bool) -> str:
    """Describe what a rank is doing that waits in a gossip step.

    Args:
        transport: transport that connects the ranks that train together.
        ranks: neighbours that it waits for.
        number: number of the gossip step, from 1.
        sending: whether it waits for them to receive its message, and not for their messages.
    """
    others = in_words(transport, ranks)
    return f"waits in gossip step {number} " + (
        f"for {others} to receive its message" if sending else f"for a message of {others}"
    )
