"""The exchanges of gossip: planned once, with memory for the messages of all steps that may be in flight."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lentando.comm.array_module import is_on_host
from lentando.comm.neighbor_exchanges import NeighborExchanges, in_gossip
from lentando.comm.topology import GraphSequence, Peers
from lentando.comm.transport import Array, Request, Transport
from lentando.optimizers.rules.flat_state import flat_state
from lentando.optimizers.rules.gossip_message import GossipMessage
from lentando.optimizers.rules.wire import Wire

__all__ = ["GossipExchanges", "Outgoing"]

GOSSIP_TAG = 1
"""Tag that separates gossip from the messages of ring reductions, which have tag 0."""


class GossipExchanges:
    """Sends messages to the out-neighbours of each step and receives those of the in-neighbours.

    Args:
        transport: transport that connects the ranks that gossip.
        graphs: graphs of the topology, by step.
        like: buffers of x, of which messages carry shares.
        wire: coding of the messages.
        staleness: number of steps whose messages may be in flight after a step.
        is_deterministic: whether a message is used exactly ``staleness`` steps after it was sent, even if it arrived
            earlier.

    Attributes:
        in_flight: expected messages that have not been used, oldest step first.
    """

    def __init__(
        self,
        transport: Transport,
        graphs: GraphSequence,
        like: Sequence[Array],
        wire: Wire,
        staleness: int,
        is_deterministic: bool,
    ) -> None:
        self._transport = transport
        self._graphs = graphs
        self._staleness = staleness
        self._is_deterministic = is_deterministic
        self._is_on_device = not all(map(is_on_host, like))
        peers = [graphs.peers_in(transport.rank, phase) for phase in range(graphs.phases)]
        neighbors = {peer for p in peers for peer, _ in (*p.out_neighbors, *p.in_neighbors)}
        self._exchanges = NeighborExchanges(transport, neighbors)
        shares = max((len({share for _, share in p.out_neighbors}) for p in peers), default=0)
        degree = max((len(p.in_neighbors) for p in peers), default=0)
        self._slots = [_Slot(like, wire, shares, degree) for _ in range(staleness + 1)]
        self.in_flight: deque[_Expected] = deque()

    def next_messages(self, step: int) -> "Outgoing":
        """Memory for the messages of a step, one for each different share that out-neighbours get.

        Waits until the messages that were sent from this memory before have been received.
        """
        peers = self._graphs.peers(self._transport.rank, step)
        slot = self._slots[step % len(self._slots)]
        if slot.request is not None:  # this rank received its own messages long ago; its out-neighbours may be behind
            self._exchanges.wait(
                slot.request,
                slot.exchange,
                slot.receivers,
                lambda ranks: in_gossip(self._transport, ranks, step + 1, sending=True),
            )
        messages = dict(zip(dict.fromkeys(share for _, share in peers.out_neighbors), slot.sent, strict=False))
        return Outgoing(step, peers, messages)

    def exchange(self, outgoing: "Outgoing") -> None:
        """Begin to send the messages of a step, and to receive those of the in-neighbours."""
        slot, peers = self._slots[outgoing.step % len(self._slots)], outgoing.peers
        sends = [(peer, part) for peer, share in peers.out_neighbors for part in outgoing.messages[share].parts]
        received = slot.received[: len(peers.in_neighbors)]
        sources = [peer for peer, _ in peers.in_neighbors]
        receives = [(peer, part) for peer, m in zip(sources, received, strict=True) for part in m.parts]
        overlap = self._staleness > 0
        slot.exchange, slot.receivers = self._exchanges.begin(), [peer for peer, _ in peers.out_neighbors]
        if self._is_on_device:
            slot.receivers += sources
        arrival: Request | None
        if self._is_on_device:  # all messages of a step are one exchange there, for the reason that DeviceArrays gives
            arrival = slot.request = self._transport.exchange(sends, receives, GOSSIP_TAG, overlap=overlap)
        else:  # two exchanges, so that waiting for what arrives does not include waiting until what was sent is taken
            arrival = self._transport.exchange([], receives, GOSSIP_TAG, overlap=overlap) if receives else None
            # This rank may compute next while the out-neighbours still wait for the rest of its message.
            slot.request = self._transport.exchange(sends, [], GOSSIP_TAG, overlap=True) if sends else None
        self.in_flight.append(_Expected(outgoing.step, arrival, received, sources, slot.exchange))

    def take(self, due: int) -> list[GossipMessage]:
        """The messages to be used now: those that have arrived, and all of steps up to ``due``, after waiting."""
        taken: list[GossipMessage] = []
        remaining: deque[_Expected] = deque()
        for expected in self.in_flight:
            if expected.step <= due:
                self._wait_for(expected)
            elif self._is_deterministic or not expected.has_arrived():
                remaining.append(expected)
                continue
            for peer, message in zip(expected.sources, expected.received, strict=True):
                message.check(peer, expected.step)
                taken.append(message)
        self.in_flight = remaining
        return taken

    def state(self) -> list[dict[str, Any]]:
        """Content of the messages in flight, for ``state_dict``. Waits for them, and leaves them in flight."""
        pending = []
        for expected in self.in_flight:
            self._wait_for(expected)  # received, not used: a resumed run uses it when this run would have
            messages = [{"weight": m.weight, "shares": flat_state(m.whole_shares())} for m in expected.received]
            pending.append({"number": expected.step, "messages": messages})
        return pending

    def load_state(self, pending: Sequence[dict[str, Any]]) -> None:
        """Replace the messages in flight by saved ones."""
        self.in_flight.clear()
        for saved in pending:
            step = saved["number"]
            slot = self._slots[step % len(self._slots)]
            received = slot.received[: len(saved["messages"])]
            for message, content in zip(received, saved["messages"], strict=True):
                message.restore(step, content["weight"], content["shares"]["flat"])
            sources = [peer for peer, _ in self._graphs.peers(self._transport.rank, step).in_neighbors]
            self.in_flight.append(_Expected(step, None, received, sources, 0))

    def _wait_for(self, expected: "_Expected") -> None:
        if expected.arrival is not None:
            self._exchanges.wait(
                expected.arrival,
                expected.exchange,
                expected.sources,
                lambda ranks: in_gossip(self._transport, ranks, expected.step + 1, sending=False),
            )


@dataclass(frozen=True)
class Outgoing:
    """Messages of one step to the out-neighbours.

    Attributes:
        step: number of the gossip step.
        peers: neighbours of this step, with the share that each out-neighbour gets.
        messages: message for each different share.
    """

    step: int
    peers: Peers
    messages: dict[float, GossipMessage]


class _Slot:
    """Memory for the messages of one step, used again when no step in flight needs it."""

    def __init__(self, like: Sequence[Array], wire: Wire, shares: int, degree: int) -> None:
        self.sent = [GossipMessage(like, wire) for _ in range(shares)]
        self.received = [GossipMessage(like, wire) for _ in range(degree)]
        self.request: Request | None = None
        self.exchange = 0
        self.receivers: list[int] = []


@dataclass
class _Expected:
    """Messages of one step that are expected from the in-neighbours.

    Attributes:
        step: number of the gossip step.
        arrival: request that is complete when all of them have arrived; None if they have arrived already.
        received: memory that they fill.
        sources: ranks that send them.
        exchange: number of the exchange among all of this rank's exchanges.
    """

    step: int
    arrival: Request | None
    received: list[GossipMessage]
    sources: list[int]
    exchange: int

    def has_arrived(self) -> bool:
        return self.arrival is None or self.arrival.test()
