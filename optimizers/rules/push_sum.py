"""Push-sum: replicas mix their parameters with their neighbours', on any graph, however late the messages.

Every rank i holds biased parameters x_i and a push-sum weight w_i, and its model the de-biased z_i = x_i / w_i, where
its gradients are taken. After each step of the base optimizer it sends shares of (x_i, w_i) to its out-neighbours and
adds up what its in-neighbours send. Sums over all ranks, messages under way included, never change by mixing, so that
every z_i approaches the mean of all, whatever the graph and however late the messages (Kempe, Dobra, Gehrke, FOCS 2003;
Assran, Loizou, Ballas, Rabbat, "Stochastic Gradient Push", ICML 2019, arXiv 1811.10792).
"""

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from typing import Any

import numpy as np

from lentando.comm.array_module import array_module, copy_into, is_on_host
from lentando.comm.dtypes import accumulator_dtype, numpy_dtype
from lentando.comm.errors import MismatchError, NonFiniteError
from lentando.comm.flat import FlatBuffer, blocks
from lentando.comm.neighbor_exchanges import NeighborExchanges, in_gossip
from lentando.comm.topology import GraphSequence, Peers
from lentando.comm.transport import Array, Request, Transport
from lentando.optimizers.rules.base_algorithm import (
    BoundAlgorithm,
    DropsNonFinite,
    OuterAverageHooks,
    Recoverable,
    Resizable,
    StatefulAlgorithm,
)
from lentando.optimizers.rules.flat_state import flat_state
from lentando.optimizers.rules.non_finite import ADVICE
from lentando.optimizers.rules.wire import WireDtype, rounded_into

__all__ = ["PushSum"]

GOSSIP_TAG = 1
"""Keeps gossip apart from the ring's messages, which use tag 0."""


class PushSum(BoundAlgorithm, OuterAverageHooks, StatefulAlgorithm, DropsNonFinite, Recoverable, Resizable):
    """Push-sum at work on one rank.

    Args:
        transport: ranks that gossip.
        parameters: flat buffers; their parameters, not their statistics, are mixed. They hold z.
        graphs: the topology's plan.
        staleness: rounds that may be under way.
        deterministic: consume each round exactly at the bound.
        weighted: whether w travels; without it w is 1.
        wire_dtype: what x is rounded to on its way; None sends it as it is.

    Attributes:
        weight: w, the push-sum weight.
        biased: x, by buffer, in float32 at least.
        round: gossip steps taken since construction.
    """

    def __init__(
        self,
        transport: Transport,
        parameters: Sequence[FlatBuffer],
        graphs: GraphSequence,
        staleness: int = 0,
        deterministic: bool = True,
        weighted: bool = True,
        wire_dtype: WireDtype | None = None,
    ) -> None:
        self._transport = transport
        self._graphs = graphs
        self._staleness = staleness
        self._deterministic = deterministic
        self._weighted = weighted
        self._model = [buffer.parameters for buffer in parameters]
        self.biased = [array_module(z).empty(z.size, accumulator_dtype(z.dtype)) for z in self._model]
        self._on_device = not all(map(is_on_host, self._model))
        self.weight = 1.0
        self._dropped_weight = 0.0  # of the weight, by ``drop_non_finite``
        self._steps_without_weight = 0
        self.round = 0
        self._begun_exchanges = 0
        self._most_begun = 0
        peers = [graphs.peers_in(transport.rank, phase) for phase in range(graphs.phases)]
        neighbors = {peer for p in peers for peer, _ in (*p.out_neighbors, *p.in_neighbors)}
        self._exchanges = NeighborExchanges(transport, neighbors)
        shares = max((len({share for _, share in p.out_neighbors}) for p in peers), default=0)
        degree = max((len(p.in_neighbors) for p in peers), default=0)
        self._rounds_to_16_bit = wire_dtype is not None
        travelling = [x.dtype if wire_dtype is None else numpy_dtype(wire_dtype) for x in self.biased]
        self._slots = [_Slot(self.biased, travelling, shares, degree) for _ in range(staleness + 1)]
        self._in_flight: deque[_Round] = deque()
        self.adopt_consensus()

    @property
    def begun_exchanges(self) -> int:
        return self._begun_exchanges

    def resume_after_failure(self, begun_exchanges: int, most_begun: int) -> None:
        # x / w is an estimate of the mean whatever was lost on the way; with w = 1 the weights' sum is right again.
        self.adopt_consensus()
        self.round = self._begun_exchanges = begun_exchanges
        self._most_begun = most_begun

    def after_step(self) -> None:
        self._begun_exchanges = self.round + 1
        if self.round < self._most_begun:  # some ranks have taken this step already, with ranks that are no more
            if not self._dropped_weight:
                self.rebase_on_model()
            self.round += 1
            return
        outgoing = self._next_messages()
        moved = not self._dropped_weight  # or x is gone, and what the base optimizer has moved is not finite
        if self._staleness:
            self._mix(moved=moved, arrived=self._take(self.round - self._staleness), outgoing=outgoing, show=True)
            self._exchange(outgoing)
        else:
            self._mix(moved=moved, outgoing=outgoing)
            self._exchange(outgoing)
            self._mix(arrived=self._take(self.round), show=True)
        self.round += 1

    def allow_drop(self) -> None:
        self._weighted = True  # a rank that sends nothing would count as zeros

    def drop_non_finite(self) -> None:
        """Send nothing, which is x = 0 and w = 0, until shares of neighbours arrive.

        z = x / w is then theirs, and with the weight that was lost this rank goes on from it: the sum of all weights
        stays the number of ranks, as if it had been restored from a rank that lies between these neighbours.
        """
        self._steps_without_weight = self._steps_without_weight + 1 if self._dropped_weight else 1
        limit = self._graphs.phases * self._transport.size + self._staleness
        if self._steps_without_weight > limit:
            raise NonFiniteError(
                f"parameters of rank {self._transport.rank} are not finite, and no neighbour has had finite ones to "
                f"restore them from for {limit} steps. {ADVICE}"
            )
        self._dropped_weight += self.weight
        self.weight = 0.0
        for x in self.biased:
            x[...] = 0

    def wait_in_flight(self) -> None:
        self._mix(arrived=self._take(self.round), show=True)

    def prepare_average(self) -> None:
        self.wait_in_flight()
        for x, z in zip(self.biased, self._model, strict=True):
            array_module(z).copyto(z, x, casting="same_kind")
            if self._dropped_weight:
                z[...] = nan  # no sum of which it is missing is an average

    def abort_average(self) -> None:
        self._mix(show=True)

    def adopt_consensus(self) -> None:
        for x, z in zip(self.biased, self._model, strict=True):
            array_module(x).copyto(x, z)
        self.weight, self._dropped_weight = 1.0, 0.0

    def rebase_on_model(self) -> None:
        for x, z in zip(self.biased, self._model, strict=True):
            np.multiply(z, self.weight, out=x)

    def state_dict(self) -> dict[str, Any]:
        pending = []
        for under_way in self._in_flight:
            self._wait_for(under_way)  # arrived, not used: resuming uses it when this run would have
            messages = [{"weight": m.weight, "shares": flat_state(m.whole_shares())} for m in under_way.received]
            pending.append({"number": under_way.number, "messages": messages})
        state = {"round": self.round, "weight": self.weight, "biased": flat_state(self.biased), "under_way": pending}
        return {**state, "lost": self._dropped_weight} if self._dropped_weight else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round = self._begun_exchanges = state["round"]
        self._most_begun = 0
        self.weight, self._dropped_weight = state["weight"], state.get("lost", 0.0)
        for own, saved in zip(self.biased, state["biased"]["flat"], strict=True):
            copy_into(own, saved)
        self._in_flight.clear()
        for saved in state["under_way"]:
            slot = self._slots[saved["number"] % len(self._slots)]
            received = slot.received[: len(saved["messages"])]
            for message, content in zip(received, saved["messages"], strict=True):
                message.restore(saved["number"], content["weight"], content["shares"]["flat"])
            self._in_flight.append(_Round(saved["number"], None, received, self._in_neighbors(saved["number"]), 0))

    def prepared_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> Sequence[Array]:
        found = []
        for number, (saved, z) in enumerate(zip(state["biased"]["flat"], parameters, strict=True)):
            x = saved.copy()
            total = _moved(x, z, state["weight"])  # not moved, unless the user has changed the model after the step
            for under_way in state["under_way"]:
                for message in under_way["messages"]:
                    total = total + message["shares"]["flat"][number]
            found.append(total)
        return found

    def state_for_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> dict[str, Any]:
        biased = [z.astype(accumulator_dtype(z.dtype)) for z in parameters]
        return {"round": state["round"], "weight": 1.0, "biased": flat_state(biased), "under_way": []}

    def _next_messages(self) -> "_Outgoing":
        """Where this round's messages are written: one for each share that out-neighbours get."""
        peers = self._graphs.peers(self._transport.rank, self.round)
        slot = self._slots[self.round % len(self._slots)]
        if slot.request is not None:  # long received here; the out-neighbours may be behind
            self._exchanges.wait(
                slot.request,
                slot.exchange,
                slot.receivers,
                lambda ranks: in_gossip(ranks, self.round + 1, sending=True),
            )
        messages = dict(zip(dict.fromkeys(share for _, share in peers.out_neighbors), slot.sent, strict=False))
        return _Outgoing(slot, peers, messages)

    def _exchange(self, outgoing: "_Outgoing") -> None:
        """Send them, and expect what the in-neighbours send."""
        slot, peers = outgoing.slot, outgoing.peers
        sends = [(peer, part) for peer, share in peers.out_neighbors for part in outgoing.messages[share].parts]
        received = slot.received[: len(peers.in_neighbors)]
        sources = [peer for peer, _ in peers.in_neighbors]
        receives = [(peer, part) for peer, m in zip(sources, received, strict=True) for part in m.parts]
        overlap = self._staleness > 0
        slot.exchange, slot.receivers = self._exchanges.begin(), [peer for peer, _ in peers.out_neighbors]
        if self._on_device:
            slot.receivers += sources
        arrival: Request | None
        if self._on_device:  # a round is one exchange there: ``DeviceArrays`` says why
            arrival = slot.request = self._transport.exchange(sends, receives, GOSSIP_TAG, overlap=overlap)
        else:  # apart, so that nobody who waits for what arrives waits until what was sent has been taken, too
            arrival = self._transport.exchange([], receives, GOSSIP_TAG, overlap=overlap) if receives else None
            # This rank may compute next while the out-neighbours still wait for the rest of its message.
            slot.request = self._transport.exchange(sends, [], GOSSIP_TAG, overlap=True) if sends else None
        self._in_flight.append(_Round(self.round, arrival, received, sources, slot.exchange))

    def _wait_for(self, under_way: "_Round") -> None:
        if under_way.arrival is not None:
            self._exchanges.wait(
                under_way.arrival,
                under_way.exchange,
                under_way.sources,
                lambda ranks: in_gossip(ranks, under_way.number + 1, sending=False),
            )

    def _take(self, due: int) -> list["_Message"]:
        """The messages to add up now: what has arrived, and rounds up to number ``due``, which are waited for."""
        taken: list[_Message] = []
        waiting: deque[_Round] = deque()
        for under_way in self._in_flight:
            if under_way.number <= due:
                self._wait_for(under_way)
            elif self._deterministic or not under_way.has_arrived():
                waiting.append(under_way)
                continue
            for peer, message in zip(under_way.sources, under_way.received, strict=True):
                message.check(peer, under_way.number)
                taken.append(message)
        self._in_flight = waiting
        return taken

    def _mix(
        self,
        moved: bool = False,
        arrived: Sequence["_Message"] = (),
        outgoing: "_Outgoing | None" = None,
        show: bool = False,
    ) -> None:
        """Everything between two waits, in one pass over memory.

        Args:
            moved: the base optimizer has moved z: move x as far. The step on x is taken with the plain learning rate.
            arrived: messages to add to x and w.
            outgoing: messages to fill with shares of x and w; what they carry leaves this rank.
            show: put z = x / w into the model.
        """
        before = self.weight
        if self._weighted:
            for message in arrived:
                self.weight += message.weight
        restored = 1.0
        if self._dropped_weight and self.weight:
            restored = (self.weight + self._dropped_weight) / self.weight
            self.weight, self._dropped_weight = self.weight + self._dropped_weight, 0.0
        shares, kept, copies = {}, 1.0, Counter[float]()
        if outgoing is not None:
            shares, kept = outgoing.messages, outgoing.peers.self_weight
            copies = Counter(share for _, share in outgoing.peers.out_neighbors)
            for share, message in shares.items():
                message.begin(self.round, share * self.weight)
            if self._weighted:
                self.weight *= kept
        for number, (whole_x, whole_z) in enumerate(zip(self.biased, self._model, strict=True)):
            for block in blocks(whole_x):
                x, z = whole_x[block], whole_z[block]
                now = _moved(x, z, before) if moved else x
                for message in arrived:
                    now = np.add(now, message.share(number, block), out=x)
                if restored != 1:
                    now = np.multiply(now, restored, out=x)
                if shares and self._rounds_to_16_bit:
                    sent = [
                        rounded_into(message.shares[number][block], now * share) * copies[share]
                        for share, message in shares.items()
                    ]
                    np.subtract(now, sum(sent[1:], start=sent[0]), out=x)
                elif outgoing is not None:
                    for share, message in shares.items():
                        np.multiply(now, share, out=message.shares[number][block])
                    np.multiply(now, kept, out=x)
                if show and self.weight:
                    _show(x, z, self.weight)

    def _in_neighbors(self, number: int) -> list[int]:
        return [peer for peer, _ in self._graphs.peers(self._transport.rank, number).in_neighbors]


def _moved(x: Array, z: Array, weight: float) -> Array:
    """X, moved as far as the base optimizer has moved z."""
    if weight == 1 and x.dtype == z.dtype:
        return z
    before = np.divide(x, weight).astype(z.dtype, copy=False)  # what ``_show`` put there, to the bit
    if x.dtype == z.dtype:
        np.add(x, np.subtract(z, before, out=before), out=x)
    else:
        np.add(x, z.astype(x.dtype) - before.astype(x.dtype), out=x)
    return x


def _show(x: Array, z: Array, weight: float) -> None:
    """Put z = x / w into the model."""
    if weight == 1:
        array_module(z).copyto(z, x, casting="same_kind")
    elif x.dtype == z.dtype:
        np.divide(x, weight, out=z)
    else:
        array_module(z).copyto(z, x / weight, casting="same_kind")


class _Message:
    """A header of two float64 (w, round) and a share of each buffer of x, as one contiguous message.

    On a device the header is a message of its own, in host memory: the host goes by it, and would have to wait for all
    that the device has been given to do, if it had to fetch it there.

    Args:
        like: the buffers of x.
        dtypes: in which they travel.

    Attributes:
        parts: the arrays that travel.
        shares: of each buffer, as they travel.
    """

    HEADER = 2

    def __init__(self, like: Sequence[Array], dtypes: Sequence[np.dtype[Any]]) -> None:
        # Eight-byte numbers first, so that each share lies at a multiple of its size.
        ordered = sorted(range(len(like)), key=lambda number: -dtypes[number].itemsize)
        lengths = [x.size * dtype.itemsize for x, dtype in zip(like, dtypes, strict=True)]
        header_bytes, size_bytes = 8 * self.HEADER, sum(lengths)
        if all(map(is_on_host, like)):
            memory = np.zeros(header_bytes + size_bytes, np.uint8)
            header, memory_of_shares = memory[:header_bytes], memory[header_bytes:]
            self.parts = [memory]
        else:
            header, memory_of_shares = (
                np.zeros(header_bytes, np.uint8),
                array_module(like[0]).zeros(size_bytes, np.uint8),
            )
            self.parts = [header, memory_of_shares]
        self._header = header.view(np.float64)
        by_number: dict[int, Array] = {}
        start = 0
        for number in ordered:
            by_number[number] = memory_of_shares[start : start + lengths[number]].view(dtypes[number])
            start += lengths[number]
        self.shares = [by_number[number] for number in range(len(like))]
        self._dtypes = [x.dtype for x in like]

    @property
    def weight(self) -> float:
        return float(self._header[0])

    def share(self, number: int, block: slice) -> Array:
        """A part of what has come for a buffer, in the buffer's dtype; no copy if it travels in that."""
        return self.shares[number][block].astype(self._dtypes[number], copy=False)

    def whole_shares(self) -> list[Array]:
        """All of what has come."""
        return [self.share(number, slice(None)) for number in range(len(self.shares))]

    def begin(self, number: int, weight: float) -> None:
        self._header[:] = weight, number

    def restore(self, number: int, weight: float, shares: Sequence[Array]) -> None:
        """As if it had come again."""
        self._header[:] = weight, number
        for part, share in zip(self.shares, shares, strict=True):
            copy_into(part, share)  # what was rounded once is not rounded again

    def check(self, peer: int, number: int) -> None:
        """A message that was lost or doubled would change the sums, and with them every rank's model."""
        if self._header[1] != number:
            raise MismatchError(
                f"expected gossip message number {number} from rank {peer}, got number {int(self._header[1])}: a "
                "message was lost, doubled or overtaken on the way"
            )


class _Slot:
    """Buffers of one round, used again when no round that is under way needs them."""

    def __init__(self, like: Sequence[Array], dtypes: Sequence[np.dtype[Any]], shares: int, degree: int) -> None:
        self.sent = [_Message(like, dtypes) for _ in range(shares)]
        self.received = [_Message(like, dtypes) for _ in range(degree)]
        self.request: Request | None = None
        self.exchange = 0
        self.receivers: list[int] = []


@dataclass(frozen=True)
class _Outgoing:
    """Messages of this round to the out-neighbours.

    Attributes:
        slot: their buffers.
        peers: who gets which share.
        messages: by share.
    """

    slot: _Slot
    peers: Peers
    messages: dict[float, _Message]


@dataclass
class _Round:
    """Messages that are expected from the in-neighbours."""

    number: int
    arrival: Request | None
    received: list[_Message]
    sources: list[int]
    exchange: int

    def has_arrived(self) -> bool:
        return self.arrival is None or self.arrival.test()
