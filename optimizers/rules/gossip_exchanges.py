"""The exchanges of gossip: what is sent in each step, and what is expected from earlier ones.

Between ranks of a node nothing is sent where one can read the memory of the other (``NeighborMemory``).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lentando.comm.closed import is_closed
from lentando.comm.forked import is_forked
from lentando.comm.neighbor_exchanges import NeighborExchanges, in_gossip
from lentando.comm.neighbor_memory import NeighborMemory
from lentando.comm.topology import GraphSequence, Peers
from lentando.comm.transport import Array, Request, Transport
from lentando.optimizers.rules.flat_state import flat_state
from lentando.optimizers.rules.gossip_memory import GossipMemory, distinct_shares
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
        peers = [graphs.peers_in(transport.rank, phase) for phase in range(graphs.phases)]
        neighbors = {peer for p in peers for peer, _ in (*p.out_neighbors, *p.in_neighbors)}
        self._exchanges = NeighborExchanges(transport, neighbors)
        self._memory = GossipMemory(transport, graphs, like, wire, staleness + 1)
        self._slots = self._memory.slots
        self._used: list[_Expected] = []
        self._begun = self._count = 0
        self.in_flight: deque[_Expected] = deque()

    def next_messages(self, step: int) -> "Outgoing":
        """Memory for the messages of a step, one for each different share that out-neighbours get.

        Waits until the messages that were sent from this memory before have been received.
        """
        peers = self._graphs.peers(self._transport.rank, step)
        slot = self._slots[step % len(self._slots)]
        # This rank received its own messages long ago; its out-neighbours may be behind. Those of this node have used a
        # message when they begin the exchange of the last step that this rank has taken, or, if none is in flight
        # after a step, the exchange that follows it.
        used_by = self._begun + (self._staleness == 0)
        for request, exchange in ((slot.sending, slot.exchange), (slot.reading, used_by)):
            if request is not None:
                self._exchanges.wait(
                    request,
                    exchange,
                    slot.receivers,
                    lambda ranks: in_gossip(self._transport, ranks, step + 1, sending=True),
                )
        slot.sending = slot.reading = None
        messages = dict(zip(distinct_shares(peers), slot.sent, strict=False))
        return Outgoing(step, peers, messages)

    def exchange(self, outgoing: "Outgoing") -> None:
        """Begin to send the messages of a step, and to receive those of the in-neighbours."""
        number = outgoing.step % len(self._slots)
        slot, peers, on_node = self._slots[number], outgoing.peers, self._memory.on_node
        sends = [
            (peer, part)
            for peer, share in peers.out_neighbors
            if peer not in on_node
            for part in outgoing.messages[share].parts
        ]
        from_afar = iter(slot.received)
        received = [
            self._memory.message_of(peer, outgoing.step) if peer in on_node else next(from_afar)
            for peer, _ in peers.in_neighbors
        ]
        sources = [peer for peer, _ in peers.in_neighbors]
        receives = [
            (peer, part) for peer, m in zip(sources, received, strict=True) if peer not in on_node for part in m.parts
        ]
        overlap = self._staleness > 0
        slot.receivers = [peer for peer, _ in peers.out_neighbors]
        slot.exchange = self._begun = self._exchanges.begin()
        self._count += 1
        arrivals: list[Request] = []
        if self._memory.is_on_device:
            # All messages of a step are one exchange there, for the reason that ``DeviceArrays`` gives.
            slot.receivers += sources
            arrivals = [self._transport.exchange(sends, receives, GOSSIP_TAG, overlap=overlap)]
            slot.sending = arrivals[0]
        else:  # two exchanges, so that waiting for what arrives does not include waiting until what was sent is taken
            if receives:
                arrivals.append(self._transport.exchange([], receives, GOSSIP_TAG, overlap=overlap))
            if sends:
                # This rank may compute next while the out-neighbours still wait for the rest of its message.
                slot.sending = self._transport.exchange(sends, [], GOSSIP_TAG, overlap=True)
            if self._memory.node is not None:
                arrivals += self._publish(self._memory.node, number, outgoing)
        self.in_flight.append(_Expected(outgoing.step, arrivals, received, sources, slot.exchange, self._count))

    def _publish(self, node: NeighborMemory, number: int, outgoing: "Outgoing") -> list[Request]:
        """Let neighbours of this node read the messages of a step. Returns the request of theirs, if there are any."""
        if is_closed(self._transport) or is_forked(self._transport):  # the memory could still be written
            self._transport.exchange([], [])  # raises the error that an exchange between nodes would raise
        slot, peers, on_node = self._slots[number], outgoing.peers, self._memory.on_node
        to = [(peer, share) for peer, share in peers.out_neighbors if peer in on_node]
        sources = [peer for peer, _ in peers.in_neighbors if peer in on_node]
        if to:
            node.publish(number, self._count)
            slot.reading = node.released([peer for peer, _ in to], number, self._count)
        for _, share in to:
            self._transport.traffic.messages += 1
            self._transport.traffic.bytes_sent += outgoing.messages[share].parts[0].nbytes
        node.sending[:] = [each.sending for each in self._slots if each.sending is not None]
        return [node.published(sources, number, self._count)] if sources else []

    def take(self, due: int) -> list[GossipMessage]:
        """The messages to be used now: those that have arrived, and all of steps up to ``due``, after waiting.

        They are valid until ``release``.
        """
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
            self._used.append(expected)
        self.in_flight = remaining
        return taken

    def release(self) -> None:
        """Let neighbours write to the memory of messages that were taken before: they have been used."""
        for expected in self._used:
            self._release(expected)
        self._used.clear()

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
        loaded: deque[_Expected] = deque()
        for saved in pending:
            step, received = saved["number"], [self._memory.new_message() for _ in saved["messages"]]
            for message, content in zip(received, saved["messages"], strict=True):
                message.restore(step, content["weight"], content["shares"]["flat"])
            sources = [peer for peer, _ in self._graphs.peers(self._transport.rank, step).in_neighbors]
            loaded.append(_Expected(step, [], received, sources, 0, 0))
        for expected in self.in_flight:  # not before: the saved content may be in the memory of neighbours
            self._release(expected)
        self.in_flight = loaded

    def _wait_for(self, expected: "_Expected") -> None:
        for arrival in expected.arrivals:
            self._exchanges.wait(
                arrival,
                expected.exchange,
                expected.sources,
                lambda ranks: in_gossip(self._transport, ranks, expected.step + 1, sending=False),
            )

    def _release(self, expected: "_Expected") -> None:
        """Let neighbours of this node write to the memory of these messages, unless they are saved ones."""
        if expected.count:
            self._memory.release(expected.sources, expected.step, expected.count)


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


@dataclass
class _Expected:
    """Messages of one step that are expected from the in-neighbours.

    Attributes:
        step: number of the gossip step.
        arrivals: requests that are complete when all of them have arrived; none if they have arrived already.
        received: memory that they fill.
        sources: ranks that send them.
        exchange: number of the exchange among all of this rank's exchanges.
        count: number of the exchange among those of this object, from 1; 0 if the messages were saved.
    """

    step: int
    arrivals: list[Request]
    received: list[GossipMessage]
    sources: list[int]
    exchange: int
    count: int

    def has_arrived(self) -> bool:
        return all(arrival.test() for arrival in self.arrivals)
