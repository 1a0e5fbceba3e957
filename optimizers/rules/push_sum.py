"""Push-sum: replicas mix their parameters with those of their neighbours, on any graph, however late the messages.

Every rank i holds biased parameters x_i and a push-sum weight w_i. Its model holds the de-biased z_i = x_i / w_i, where
its gradients are computed. After each step of the base optimizer it sends shares of (x_i, w_i) to its out-neighbours,
and adds the shares that its in-neighbours have sent. Mixing changes none of the sums over all ranks, messages in flight
included, so that every z_i approaches the mean of all, whatever the graph and however late the messages (Kempe, Dobra,
Gehrke, FOCS 2003; Assran, Loizou, Ballas, Rabbat, "Stochastic Gradient Push", ICML 2019, arXiv 1811.10792).
"""

from collections.abc import Sequence
from math import nan
from typing import Any

from lentando.comm.array_module import array_module
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import NonFiniteError
from lentando.comm.flat import FlatBuffer
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
from lentando.optimizers.rules.biased_parameters import BiasedParameters, moved_with_model
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
        wire = wire or wire_of(None)
        self._model = [buffer.parameters for buffer in parameters]
        self._x = BiasedParameters(self._model, wire)
        self.weight = 1.0
        self._dropped_weight = 0.0  # part of w that ``drop_non_finite`` has taken away
        self._steps_without_weight = 0
        self.round = 0
        self._begun_exchanges = 0
        self._most_begun = 0
        self.exchanges = GossipExchanges(transport, graphs, self._x.memory, wire, staleness, deterministic)
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
        return self._x.settle()

    # Around an outer average

    def wait_in_flight(self) -> None:
        self._mix(arrived=self.exchanges.take(self.round), show=True)

    def prepare_average(self) -> None:
        self.wait_in_flight()
        for x, z in zip(self._x.current(), self._model, strict=True):
            if x is not z:
                array_module(z).copyto(z, x, casting="same_kind")
            if self._dropped_weight:
                z[...] = nan  # the mean of all x is wrong while this rank's x is missing

    def abort_average(self) -> None:
        self._mix(show=True)

    def adopt_consensus(self) -> None:
        self.weight, self._dropped_weight = 1.0, 0.0
        self._x.take_from_model(self.weight)

    def rebase_on_model(self) -> None:
        self._x.take_from_model(self.weight)

    # State

    def state_dict(self) -> dict[str, Any]:
        in_flight = self.exchanges.state()
        state = {
            "round": self.round,
            "weight": self.weight,
            "biased": flat_state(self._x.current()),
            "under_way": in_flight,
        }
        return {**state, "lost": self._dropped_weight} if self._dropped_weight else state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.round = self._begun_exchanges = state["round"]
        self._most_begun = 0
        self.weight, self._dropped_weight = state["weight"], state.get("lost", 0.0)
        self._x.load(state["biased"]["flat"])
        self.exchanges.load_state(state["under_way"])

    def prepared_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> Sequence[Array]:
        prepared = []
        for number, (saved, z) in enumerate(zip(state["biased"]["flat"], parameters, strict=True)):
            x = saved.copy()
            # x is not moved, unless the user has changed the model after the step.
            total = moved_with_model(x, z, state["weight"])
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

    def _mix(
        self,
        moved: bool = False,
        arrived: Sequence[GossipMessage] = (),
        outgoing: Outgoing | None = None,
        show: bool = False,
    ) -> None:
        """Do everything between two waits: update w, and mix x.

        Args:
            moved: whether the base optimizer has moved z.
            arrived: messages to add to x and w. Their memory is released.
            outgoing: messages to fill with shares of x and w, which leave this rank.
            show: whether to put z = x / w into the model.
        """
        before, restored = self.weight, 1.0
        if self._is_weighted:
            for message in arrived:
                self.weight += message.weight
        if self._dropped_weight and self.weight:
            restored = (self.weight + self._dropped_weight) / self.weight
            self.weight, self._dropped_weight = self.weight + self._dropped_weight, 0.0
        if outgoing is not None:
            for share, message in outgoing.messages.items():
                message.write_header(self.round, share * self.weight)
            if self._is_weighted:
                self.weight *= outgoing.peers.self_weight
        self._x.mix(before, self.weight, moved, arrived, restored, outgoing, show and bool(self.weight))
        if arrived:
            self.exchanges.release()
