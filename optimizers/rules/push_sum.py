"""Push-sum: replicas mix their parameters with those of their neighbours, on any graph, however late the messages.

Every rank i holds biased parameters x_i and a push-sum weight w_i. Its model holds the de-biased z_i = x_i / w_i, where
its gradients are computed. After each step of the base optimizer it sends shares of (x_i, w_i) to its out-neighbours,
and adds the shares that its in-neighbours have sent. Mixing changes none of the sums over all ranks, messages in flight
included, so that every z_i approaches the mean of all, whatever the graph and however late the messages (Kempe, Dobra,
Gehrke, FOCS 2003; Assran, Loizou, Ballas, Rabbat, "Stochastic Gradient Push", ICML 2019, arXiv 1811.10792).
"""

from collections import Counter
from collections.abc import Sequence
from math import frexp, nan
from typing import Any

import numpy as np

from lentando.comm.array_module import array_module, copy_into, is_on_host
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import NonFiniteError
from lentando.comm.flat import BLOCK, FlatBuffer, blocks
from lentando.comm.numbering import number_of
from lentando.comm.topology import GraphSequence
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.base_algorithm import (
    BoundAlgorithm,
    DropsNonFinite,
    OuterAverageHooks,
    Recoverable,
    Resizable,
    StatefulAlgorithm,
)
from lentando.optimizers.rules.flat_state import flat_state
from lentando.optimizers.rules.gossip_exchanges import GossipExchanges, Outgoing
from lentando.optimizers.rules.gossip_message import GossipMessage
from lentando.optimizers.rules.non_finite import ADVICE
from lentando.optimizers.rules.wire import Wire, wire_of

__all__ = ["PushSum"]


class PushSum(BoundAlgorithm, OuterAverageHooks, StatefulAlgorithm, DropsNonFinite, Recoverable, Resizable):
    """Push-sum at work on one rank.

    Args:
        transport: transport that connects the ranks that gossip.
        parameters: flat buffers of the model, which hold z. Their parameters are mixed, their statistics are not.
        graphs: graphs of the topology, by step.
        staleness: number of steps whose messages may be in flight after a step.
        deterministic: whether messages are used exactly ``staleness`` steps after they were sent.
        weighted: whether messages carry w; without it w is 1.
        wire: coding of the messages; full precision by default.

    Attributes:
        weight: the push-sum weight w.
        round: number of gossip steps taken.
        exchanges: exchanges of messages with the neighbours.
    """

    def __init__(
        self,
        transport: Transport,
        parameters: Sequence[FlatBuffer],
        graphs: GraphSequence,
        staleness: int = 0,
        deterministic: bool = True,
        weighted: bool = True,
        wire: Wire | None = None,
    ) -> None:
        self._transport = transport
        self._graphs = graphs
        self._staleness = staleness
        self._is_weighted = weighted
        self._wire = wire or wire_of(None)
        self._model = [buffer.parameters for buffer in parameters]
        self._x = [array_module(z).empty(z.size, accumulator_dtype(z.dtype)) for z in self._model]
        # New memory for each block would cost as much as the arithmetic. On a device a block is a whole buffer.
        longest = {x.dtype: min(BLOCK, max(x.size for x in self._x)) for x in self._x if is_on_host(x)}
        self._scratch: dict[Any, Array] = {dtype: np.empty(size, dtype) for dtype, size in longest.items()}
        self._is_in_model = False  # whether the model holds x where it has the same dtype, because w is 1
        self._factor = 1.0  # by which x has yet to be multiplied
        self.weight = 1.0
        self._dropped_weight = 0.0  # part of w that ``drop_non_finite`` has taken away
        self._steps_without_weight = 0
        self.round = 0
        self._begun_exchanges = 0
        self._most_begun = 0
        self.exchanges = GossipExchanges(transport, graphs, self._x, self._wire, staleness, deterministic)
        self.adopt_consensus()

    def after_step(self) -> None:
        self._begun_exchanges = self.round + 1
        if self.round < self._most_begun:  # some ranks have taken this step already, with ranks that have died since
            if not self._dropped_weight:
                self.rebase_on_model()
            self.round += 1
            return
        outgoing = self.exchanges.next_messages(self.round)
        moved = not self._dropped_weight  # otherwise x is lost, and what the base optimizer has moved is not finite
        if self._staleness:
            arrived = self.exchanges.take(self.round - self._staleness)
            self._mix(moved=moved, arrived=arrived, outgoing=outgoing, show=True)
            self.exchanges.exchange(outgoing)
        else:
            self._mix(moved=moved, outgoing=outgoing)
            self.exchanges.exchange(outgoing)
            self._mix(arrived=self.exchanges.take(self.round), show=True)
        self.round += 1

    @property
    def biased(self) -> Sequence[Array]:
        """The biased parameters x, one one-dimensional array per buffer, in float32 at least."""
        for x, now in zip(self._x, self._values(), strict=True):
            if now is not x:
                array_module(x).copyto(x, now)
            if self._factor != 1:
                np.multiply(x, self._factor, out=x)
        self._is_in_model, self._factor = False, 1.0
        return self._x

    # Around an outer average

    def wait_in_flight(self) -> None:
        self._mix(arrived=self.exchanges.take(self.round), show=True)

    def prepare_average(self) -> None:
        self.wait_in_flight()
        for x, z in zip(self._current(), self._model, strict=True):
            if x is not z:
                array_module(z).copyto(z, x, casting="same_kind")
            if self._dropped_weight:
                z[...] = nan  # the mean of all x is wrong while this rank's x is missing

    def abort_average(self) -> None:
        self._mix(show=True)

    def adopt_consensus(self) -> None:
        self.weight, self._dropped_weight = 1.0, 0.0
        self._take_from_model()

    def rebase_on_model(self) -> None:
        self._take_from_model()

    def _take_from_model(self) -> None:
        self._is_in_model, self._factor = self.weight == 1, 1.0
        for x, now, z in zip(self._x, self._values(), self._model, strict=True):
            if now is not z:
                np.multiply(z, self.weight, out=x)

    # State

    def state_dict(self) -> dict[str, Any]:
        in_flight = self.exchanges.state()
        state = {
            "round": self.round,
            "weight": self.weight,
            "biased": flat_state(self._current()),
            "under_way": in_flight,
        }
        return {**state, "lost": self._dropped_weight} if self._dropped_weight else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round = self._begun_exchanges = state["round"]
        self._most_begun = 0
        self.weight, self._dropped_weight = state["weight"], state.get("lost", 0.0)
        for x, saved in zip(self._x, state["biased"]["flat"], strict=True):
            copy_into(x, saved)
        self._is_in_model, self._factor = False, 1.0
        self.exchanges.load_state(state["under_way"])

    def prepared_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> Sequence[Array]:
        prepared = []
        for number, (saved, z) in enumerate(zip(state["biased"]["flat"], parameters, strict=True)):
            x = saved.copy()
            total = _moved(x, z, state["weight"])  # not moved, unless the user has changed the model after the step
            for in_flight in state["under_way"]:
                for message in in_flight["messages"]:
                    total = total + message["shares"]["flat"][number]
            prepared.append(total)
        return prepared

    def state_for_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> dict[str, Any]:
        biased = [z.astype(accumulator_dtype(z.dtype)) for z in parameters]
        return {"round": state["round"], "weight": 1.0, "biased": flat_state(biased), "under_way": []}

    # Values that are not finite

    def allow_drop(self) -> None:
        self._is_weighted = True  # without weights, a rank that sends nothing would count as zeros

    def drop_non_finite(self) -> None:
        """Send nothing, which is x = 0 and w = 0, until shares of neighbours arrive.

        Then z = x / w is the neighbours' average, and this rank continues from it with the weight that was dropped: the
        sum of all weights remains the number of ranks, as if this rank's parameters had been between its neighbours'.
        """
        self._steps_without_weight = self._steps_without_weight + 1 if self._dropped_weight else 1
        limit = self._graphs.phases * self._transport.size + self._staleness
        if self._steps_without_weight > limit:
            raise NonFiniteError(
                f"parameters of rank {number_of(self._transport)} are not finite, and no neighbour has had finite ones "
                f"to restore them from for {limit} steps. {ADVICE}"
            )
        self._dropped_weight += self.weight
        self.weight = 0.0
        for x in self.biased:
            x[...] = 0

    # Recovery after ranks have died

    @property
    def begun_exchanges(self) -> int:
        return self._begun_exchanges

    def resume_after_failure(self, begun_exchanges: int, most_begun: int) -> None:
        # x / w estimates the mean whatever was lost in flight; with w = 1 the sum of the weights is right again.
        self.adopt_consensus()
        self.round = self._begun_exchanges = begun_exchanges
        self._most_begun = most_begun

    def _values(self) -> list[Array]:
        """Values of x, not yet multiplied by the factor: in the model, or in memory of its own."""
        return [z if self._is_in_model and x.dtype == z.dtype else x for x, z in zip(self._x, self._model, strict=True)]

    def _current(self) -> Sequence[Array]:
        """Values of x, to be read only."""
        return self._values() if self._factor == 1 else self.biased

    def _mix(
        self,
        moved: bool = False,
        arrived: Sequence[GossipMessage] = (),
        outgoing: Outgoing | None = None,
        show: bool = False,
    ) -> None:
        """Do everything between two waits, in one pass over memory.

        While w is 1, x is what the model holds, and is not written anywhere else. What x is multiplied by when shares
        of it have left is left to the next pass, unless the model has to show the result.

        Args:
            moved: whether the base optimizer has moved z. x is moved as far: its step has the plain learning rate.
            arrived: messages to add to x and w. Their memory is released.
            outgoing: messages to fill with shares of x and w, which leave this rank.
            show: whether to put z = x / w into the model.
        """
        if moved and (self._factor != 1 or (self._is_in_model and self.weight != 1)):
            _ = self.biased  # an error came between the passes of a step, or the weight was set
        before = self.weight
        if self._is_weighted:
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
                message.write_header(self.round, share * self.weight)
            if self._is_weighted:
                self.weight *= kept
        factor, show = self._factor, show and bool(self.weight)
        is_deferred = outgoing is not None and self._wire.is_exact and not show
        self._factor = kept if is_deferred else 1.0
        in_model = self._is_in_model if not moved else before == 1
        if show:
            self._is_in_model = self.weight == 1
        elif arrived or factor != 1 or restored != 1 or (outgoing is not None and not is_deferred):
            self._is_in_model = False
        else:
            self._is_in_model = in_model
        for number, (whole_x, whole_z) in enumerate(zip(self._x, self._model, strict=True)):
            is_same = whole_x.dtype == whole_z.dtype
            for block in blocks(whole_x):
                x, z = whole_x[block], whole_z[block]
                target = z if is_same and show and self._is_in_model else x
                now = _moved(x, z, before, self._scratch.get(x.dtype)) if moved else z if is_same and in_model else x
                if factor != 1:
                    now = np.multiply(now, factor, out=target)
                for message in arrived:
                    now = np.add(now, message.shares[number].read(block), out=target)
                if restored != 1:
                    now = np.multiply(now, restored, out=target)
                if shares and not self._wire.is_exact:
                    sent = [
                        message.shares[number].write(block, now, share) * copies[share]
                        for share, message in shares.items()
                    ]
                    now = np.subtract(now, sum(sent[1:], start=sent[0]), out=target)
                elif outgoing is not None:
                    for share, message in shares.items():
                        message.shares[number].write(block, now, share)
                    if not is_deferred:
                        now = np.multiply(now, kept, out=target)
                if show:
                    if now is not target:
                        array_module(x).copyto(target, now)
                    if target is x:
                        _show(x, z, self.weight)
        if arrived:
            self.exchanges.release()


def _moved(x: Array, z: Array, weight: float, scratch: Array | None = None) -> Array:
    """x, moved as far as the base optimizer has moved z."""
    if weight == 1 and x.dtype == z.dtype:
        return z
    before = _divide(x, weight, None if scratch is None else scratch[: x.size])
    before = before.astype(z.dtype, copy=False)  # exactly what ``_show`` has put there
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
        _divide(x, weight, z)
    else:
        array_module(z).copyto(z, x / weight, casting="same_kind")


def _divide(x: Array, weight: float, out: Array | None) -> Array:
    """Return x / w, in ``out`` if that is given. For a power of 2 it multiplies, which is faster and as exact."""
    if frexp(weight)[0] == 0.5:
        quotient: Array = np.multiply(x, 1 / weight, out=out)
    else:
        quotient = np.divide(x, weight, out=out)
    return quotient
