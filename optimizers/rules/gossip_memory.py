"""Memory for the messages of gossip. Neighbours on the same node read each other's messages where they are."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from lentando.comm.array_module import is_on_host
from lentando.comm.neighbor_memory import NeighborMemory, open_neighbor_memory
from lentando.comm.topology import GraphSequence, Peers
from lentando.comm.transport import Array, Request, Transport
from lentando.optimizers.rules.gossip_message import GossipMessage
from lentando.optimizers.rules.wire import Wire

__all__ = ["GossipMemory", "Slot", "distinct_shares"]

ALIGNMENT_BYTES = 64
"""Messages in the memory of a node begin at a multiple of so many bytes."""


def distinct_shares(peers: Peers) -> list[float]:
    """Return the different shares that the out-neighbours of a rank get, in the order of its messages."""
    return list(dict.fromkeys(share for _, share in peers.out_neighbors))


@dataclass
class Slot:
    """Memory for the messages of one step, used again when no step in flight needs it.

    Attributes:
        sent: messages that this rank sends, one for each different share.
        received: messages that ranks of other nodes send.
        sending: request that is complete when ranks of other nodes no longer need ``sent``; None if there are none.
        reading: the same for ranks of this node.
        exchange: number of the exchange among all of this rank's exchanges.
        receivers: ranks that receive the messages.
    """

    sent: list[GossipMessage]
    received: list[GossipMessage]
    sending: Request | None = None
    reading: Request | None = None
    exchange: int = 0
    receivers: list[int] = field(default_factory=list)


class GossipMemory:
    """Memory for the messages of several steps, allocated once. Collective, as ``open_neighbor_memory``.

    Args:
        transport: transport that connects the ranks that gossip.
        graphs: graphs of the topology, by step.
        like: buffers of x, of which messages carry shares.
        wire: coding of the messages.
        steps: number of steps whose messages may be in flight together.

    Attributes:
        is_on_device: whether messages are in the memory of a GPU.
        slots: memory for the messages of each of these steps; step t uses number ``t % steps``.
        node: memory that the neighbours on this node share with this rank; None if there are none.
        on_node: these neighbours.
    """

    def __init__(
        self, transport: Transport, graphs: GraphSequence, like: Sequence[Array], wire: Wire, steps: int
    ) -> None:
        self._transport = transport
        self._graphs = graphs
        self._like, self._wire = like, wire
        self._size_bytes = GossipMessage.size_bytes(like, wire)
        self._stride = self._size_bytes + -self._size_bytes % ALIGNMENT_BYTES
        self._read: dict[tuple[int, int, int], GossipMessage] = {}
        peers = [graphs.peers_in(transport.rank, phase) for phase in range(graphs.phases)]
        shares = max((len(distinct_shares(p)) for p in peers), default=0)
        self.is_on_device = not all(map(is_on_host, like))
        self.node: NeighborMemory | None = None
        if not self.is_on_device:
            self.node = open_neighbor_memory(transport, steps, shares * self._stride)
        self.on_node = frozenset[int]() if self.node is None else self.node.neighbors
        degree = max((sum(peer not in self.on_node for peer, _ in p.in_neighbors) for p in peers), default=0)
        self.slots = [self._make_slot(number, shares, degree) for number in range(steps)]

    def new_message(self) -> GossipMessage:
        """Return a message in memory of its own."""
        return GossipMessage(self._like, self._wire)

    def message_of(self, peer: int, step: int) -> GossipMessage:
        """Return the message of a neighbour on this node to this rank, in the neighbour's memory."""
        assert self.node is not None
        theirs = self._graphs.peers(peer, step)
        place = distinct_shares(theirs).index(dict(theirs.out_neighbors)[self._transport.rank])
        number = step % len(self.slots)
        key = peer, number, place
        if key not in self._read:
            self._read[key] = self._message_in(self.node.slot(peer, number), place)
        return self._read[key]

    def release(self, sources: Iterable[int], step: int, count: int) -> None:
        """Let neighbours on this node write to the memory of messages that this rank has used.

        Args:
            sources: ranks that have sent them, of this node or others.
            step: number of the gossip step.
            count: number of the exchange that they belong to.
        """
        if self.node is not None:
            for peer in sources:
                if peer in self.on_node:
                    self.node.release(peer, step % len(self.slots), count)

    def _message_in(self, slot: Array, place: int) -> GossipMessage:
        """Message number ``place`` in the memory of a slot."""
        start = place * self._stride
        return GossipMessage(self._like, self._wire, slot[start : start + self._size_bytes])

    def _make_slot(self, number: int, shares: int, degree: int) -> Slot:
        """Memory for ``shares`` messages to be sent, and ``degree`` from other nodes."""
        received = [self.new_message() for _ in range(degree)]
        if self.node is None:
            return Slot([self.new_message() for _ in range(shares)], received)
        own = self.node.slot(self._transport.rank, number)
        return Slot([self._message_in(own, place) for place in range(shares)], received)
