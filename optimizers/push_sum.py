"""Push-sum: replicas mix their parameters with their neighbours', on any graph, however late the messages.

Every rank i holds biased parameters x_i and a push-sum weight w_i, and its model the de-biased z_i = x_i / w_i, where
its gradients are taken. After each step of the base optimizer it sends shares of (x_i, w_i) to its out-neighbours and
adds up what its in-neighbours send. Sums over all ranks, messages under way included, never change by mixing, so that
every z_i approaches the mean of all, whatever the graph and however late the messages (Kempe, Dobra, Gehrke, FOCS 2003;
Assran, Loizou, Ballas, Rabbat, "Stochastic Gradient Push", ICML 2019, arXiv 1811.10792).
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import MismatchError
from lentando.comm.flat import FlatBuffer, blocks
from lentando.comm.topology import GraphSequence
from lentando.comm.transport import Array, Request, Transport
from lentando.optimizers.base_algorithms import InnerSteps
from lentando.optimizers.flat_state import flat_state

__all__ = ["PushSum"]

GOSSIP_TAG = 1
"""Keeps gossip apart from the ring's messages, which use tag 0."""


class PushSum(InnerSteps):
    """Push-sum at work on one rank.

    Args:
        transport: ranks that gossip.
        parameters: flat buffers; their parameters, not their statistics, are mixed. They hold z.
        graphs: the topology's plan.
        staleness: rounds that may be under way.
        deterministic: consume each round exactly at the bound.
        weighted: whether w travels; without it w is 1.

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
    ) -> None:
        self._transport = transport
        self._graphs = graphs
        self._staleness = staleness
        self._deterministic = deterministic
        self._weighted = weighted
        self._model = [buffer.parameters for buffer in parameters]
        self.biased = [np.empty(z.size, accumulator_dtype(z.dtype)) for z in self._model]
        self.weight = 1.0
        self.round = 0
        peers = [graphs.peers_in(transport.rank, phase) for phase in range(graphs.phases)]
        shares = max((len({share for _, share in p.out_neighbors}) for p in peers), default=0)
        degree = max((len(p.in_neighbors) for p in peers), default=0)
        self._slots = [_Slot(self.biased, shares, degree) for _ in range(staleness + 1)]
        self._under_way: deque[_Round] = deque()
        self.restart()

    def after_step(self) -> None:
        self._follow_model()
        if self._staleness:
            self._collect(self.round - self._staleness)
        self._start_round()
        if not self._staleness:
            self._collect(self.round)
        self.round += 1
        self._show_model()

    def drain(self) -> None:
        self._collect(self.round)
        self._show_model()

    def expose(self) -> None:
        self.drain()
        for x, z in zip(self.biased, self._model, strict=True):
            np.copyto(z, x, casting="same_kind")

    def retract(self) -> None:
        self._show_model()

    def restart(self) -> None:
        for x, z in zip(self.biased, self._model, strict=True):
            np.copyto(x, z)
        self.weight = 1.0

    def follow(self) -> None:
        for x, z in zip(self.biased, self._model, strict=True):
            np.multiply(z, self.weight, out=x)

    def state_dict(self) -> dict[str, Any]:
        pending = []
        for under_way in self._under_way:
            under_way.wait()  # arrived, not used: resuming uses it when this run would have
            messages = [{"weight": m.weight, "shares": flat_state(m.shares)} for m in under_way.received]
            pending.append({"number": under_way.number, "messages": messages})
        return {"round": self.round, "weight": self.weight, "biased": flat_state(self.biased), "under_way": pending}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round, self.weight = state["round"], state["weight"]
        for own, saved in zip(self.biased, state["biased"]["flat"], strict=True):
            np.copyto(own, saved)
        self._under_way.clear()
        for saved in state["under_way"]:
            slot = self._slots[saved["number"] % len(self._slots)]
            received = slot.received[: len(saved["messages"])]
            for message, content in zip(received, saved["messages"], strict=True):
                message.restore(saved["number"], content["weight"], content["shares"]["flat"])
            self._under_way.append(_Round(saved["number"], None, received, self._in_neighbors(saved["number"])))

    def _start_round(self) -> None:
        """Send shares of x and w, keep the rest, and expect what the in-neighbours send."""
        peers = self._graphs.peers(self._transport.rank, self.round)
        slot = self._slots[self.round % len(self._slots)]
        if slot.request is not None:
            slot.request.wait()  # long received here; the out-neighbours may be behind
        messages = dict(zip(dict.fromkeys(share for _, share in peers.out_neighbors), slot.sent, strict=False))
        for share, message in messages.items():
            message.fill(self.round, share, self.weight, self.biased)
        sends = [(peer, messages[share].memory) for peer, share in peers.out_neighbors]
        for x in self.biased:
            np.multiply(x, peers.self_weight, out=x)
        if self._weighted:
            self.weight *= peers.self_weight
        received = slot.received[: len(peers.in_neighbors)]
        sources = [peer for peer, _ in peers.in_neighbors]
        receives = [(peer, message.memory) for peer, message in zip(sources, received, strict=True)]
        overlap = self._staleness > 0
        arrival = self._transport.exchange([], receives, GOSSIP_TAG, overlap=overlap) if receives else None
        slot.request = self._transport.exchange(sends, [], GOSSIP_TAG, overlap=overlap) if sends else None
        self._under_way.append(_Round(self.round, arrival, received, sources))

    def _collect(self, due: int) -> None:
        """Add what has arrived; wait for rounds up to number ``due``."""
        waiting: deque[_Round] = deque()
        for under_way in self._under_way:
            if under_way.number <= due:
                under_way.wait()
            elif self._deterministic or not under_way.has_arrived():
                waiting.append(under_way)
                continue
            for peer, message in zip(under_way.sources, under_way.received, strict=True):
                message.check(peer, under_way.number)
                for x, share in zip(self.biased, message.shares, strict=True):
                    np.add(x, share, out=x)
                if self._weighted:
                    self.weight += message.weight
        self._under_way = waiting

    def _in_neighbors(self, number: int) -> list[int]:
        return [peer for peer, _ in self._graphs.peers(self._transport.rank, number).in_neighbors]

    def _follow_model(self) -> None:
        """The base optimizer has moved z: move x as far. The step on x is taken with the plain learning rate."""
        for x, z in zip(self.biased, self._model, strict=True):
            if self.weight == 1 and x.dtype == z.dtype:
                np.copyto(x, z)
                continue
            for block in blocks(x.size):
                before = (x[block] / self.weight).astype(z.dtype)  # what ``_show_model`` put there, to the bit
                x[block] += z[block].astype(x.dtype) - before.astype(x.dtype)

    def _show_model(self) -> None:
        """Z = x / w."""
        for x, z in zip(self.biased, self._model, strict=True):
            if self.weight == 1:
                np.copyto(z, x, casting="same_kind")
            elif x.dtype == z.dtype:
                np.divide(x, self.weight, out=z)
            else:
                np.copyto(z, x / self.weight, casting="same_kind")


class _Message:
    """One contiguous message: a header of two float64 (w, round) and a share of each buffer of x."""

    HEADER = 2

    def __init__(self, like: Sequence[Array]) -> None:
        # Eight-byte numbers first, so that each part lies at a multiple of its size.
        ordered = sorted(range(len(like)), key=lambda number: -like[number].itemsize)
        self.memory = np.zeros(8 * self.HEADER + sum(x.nbytes for x in like), np.uint8)
        self._header = self.memory[: 8 * self.HEADER].view(np.float64)
        parts: dict[int, Array] = {}
        start = 8 * self.HEADER
        for number in ordered:
            x = like[number]
            parts[number] = self.memory[start : start + x.nbytes].view(x.dtype)
            start += x.nbytes
        self.shares = [parts[number] for number in range(len(like))]

    @property
    def weight(self) -> float:
        return float(self._header[0])

    def fill(self, number: int, share: float, weight: float, biased: Sequence[Array]) -> None:
        self._header[:] = share * weight, number
        for part, x in zip(self.shares, biased, strict=True):
            np.multiply(x, share, out=part)

    def restore(self, number: int, weight: float, shares: Sequence[Array]) -> None:
        """As if it had come again."""
        self._header[:] = weight, number
        for part, share in zip(self.shares, shares, strict=True):
            np.copyto(part, share)

    def check(self, peer: int, number: int) -> None:
        """A message that was lost or doubled would change the sums, and with them every rank's model."""
        if self._header[1] != number:
            raise MismatchError(
                f"expected gossip message number {number} from rank {peer}, got number {int(self._header[1])}: a "
                "message was lost, doubled or overtaken on the way"
            )


class _Slot:
    """Buffers of one round, used again when no round that is under way needs them."""

    def __init__(self, like: Sequence[Array], shares: int, degree: int) -> None:
        self.sent = [_Message(like) for _ in range(shares)]
        self.received = [_Message(like) for _ in range(degree)]
        self.request: Request | None = None


@dataclass
class _Round:
    """Messages that are expected from the in-neighbours."""

    number: int
    arrival: Request | None
    received: list[_Message]
    sources: list[int]

    def wait(self) -> None:
        if self.arrival is not None:
            self.arrival.wait()

    def has_arrived(self) -> bool:
        return self.arrival is None or self.arrival.test()
