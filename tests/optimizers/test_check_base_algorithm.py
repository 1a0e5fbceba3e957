"""``check_base_algorithm`` accepts our base algorithms, and rejects wrong ones with an error that says why."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import networkx as nx
import numpy as np
import pytest
from case_selection import selected_cases

from lentando.comm.flat import FlatBuffer
from lentando.comm.topology import Complete, FromGraph, GraphSequence, OnePeerExponential, Ring, Topology
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm, BoundAlgorithm
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.partial_average import PartialAverage
from lentando.optimizers.rules.push_sum import PushSum
from lentando.optimizers.testing import check_base_algorithm


@dataclass(frozen=True)
class Uneven:
    """A cycle with an edge from rank 0 to each other rank, so that push-sum weights differ."""

    def for_size(self, size: int) -> GraphSequence:
        if size == 1:
            return OnePeerExponential().for_size(1)
        graph = nx.cycle_graph(size, create_using=nx.DiGraph)
        graph.add_edges_from((0, rank) for rank in range(1, size))
        return FromGraph(graph).for_size(size)


OURS = [
    LocalSGD(),
    AllReduce(algorithm="ring"),
    AllReduce(overlap=True),
    SGP(Uneven()),
    OSGP(Uneven(), staleness=2),
    SGP(Complete(), wire_dtype="float16"),
    DPSGD(),
    *selected_cases([], [AllReduce(), SGP(), SGP(Ring()), OSGP()]),  # simpler graphs, and fewer messages in flight
    OSGP(staleness=3, deterministic=True),
    OSGP(staleness=2, wire_dtype="bfloat16"),
]


@pytest.mark.slow
@pytest.mark.parametrize("base", OURS, ids=repr)
def test_our_base_algorithms_are_accepted(base: BaseAlgorithm) -> None:
    check_base_algorithm(lambda: base)


# --- a base algorithm as a third party writes it, without any optional protocol ---------------------------------------


class HalfwayToMean(BoundAlgorithm):
    """Moves each replica halfway to the mean of all."""

    def __init__(self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]) -> None:
        self.transport = transport
        self.parameters = parameters
        self.gradients = gradients

    def after_step(self) -> None:
        for buffer in self.parameters:
            self.mix(buffer.parameters)

    def mix(self, array: Array) -> None:
        array[:] = (array.astype(np.float64) + self.mean(array)) / 2

    def mean(self, array: Array) -> Array:
        mean: Array = self.transport.allgather(array.astype(np.float64)).mean(axis=0)
        return mean


@dataclass(frozen=True)
class Halfway:
    averages_gradients: ClassVar[bool] = False
    communicates: ClassVar[bool] = True
    mixes_parameters: ClassVar[bool] = True
    bound: ClassVar[type[HalfwayToMean]] = HalfwayToMean

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        return self.bound(transport, parameters, gradients)


@pytest.mark.slow
def test_an_algorithm_with_step_hooks_alone_is_accepted() -> None:
    check_base_algorithm(Halfway)


# --- wrong descriptions and step hooks --------------------------------------------------------------------------------


@dataclass(frozen=True)
class WithoutDeclaration(Halfway):
    communicates: ClassVar[bool] = None  # type: ignore[assignment]


class NotComparable(Halfway):
    def __eq__(self, other: object) -> bool:
        return self is other

    def __hash__(self) -> int:
        return id(self)


@dataclass(frozen=True)
class Contradictory(Halfway):
    communicates: ClassVar[bool] = False


@dataclass(frozen=True)
class ChangesBuffersWhenBound(Halfway):
    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        parameters[0].array[:] = 0
        return super().bind(transport, parameters, gradients)


@dataclass(frozen=True)
class WithoutStepHook(Halfway):
    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        class Bound:
            def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
                return

        return Bound()  # type: ignore[return-value]


class PreparesAndCannotAbort(HalfwayToMean):
    def prepare_average(self) -> None:
        return


class SendsNothing(HalfwayToMean):
    def after_step(self) -> None:
        for buffer in self.parameters:
            buffer.parameters[:] = buffer.parameters / min(2, self.transport.size)


class ChangesNothing(HalfwayToMean):
    def mix(self, array: Array) -> None:
        self.mean(array)


class MixesStatistics(HalfwayToMean):
    def after_step(self) -> None:
        for buffer in self.parameters:
            self.mix(buffer.array)


class DecaysAlone(HalfwayToMean):
    def mix(self, array: Array) -> None:
        array[:] = self.mean(array) if self.transport.size > 1 else array / 2


class LosesMass(HalfwayToMean):
    def mix(self, array: Array) -> None:
        array[:] = self.mean(array) * (0.9 if self.transport.size > 1 else 1)


class ShiftsInPlaceOfMixing(HalfwayToMean):
    def mix(self, array: Array) -> None:
        array[:] = self.transport.allgather(array.astype(np.float64))[self.transport.rank - 1]


class AveragesGradients(HalfwayToMean):
    def after_step(self) -> None:
        return

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        for buffer in self.gradients:
            self.average(buffer.array, partial_average)

    def average(self, array: Array, partial_average: PartialAverage | None) -> None:
        if partial_average is None:
            array[:] = self.mean(array)
        else:
            array[:] = self.mean(array * partial_average.is_active) * self.transport.size / partial_average.active_ranks


class SumsGradients(AveragesGradients):
    def average(self, array: Array, partial_average: PartialAverage | None) -> None:
        array[:] = self.mean(array) * self.transport.size


class RoundsGradientsByRank(AveragesGradients):
    def average(self, array: Array, partial_average: PartialAverage | None) -> None:
        array[:] = self.mean(array) * (1 + 1e-6 * self.transport.rank)


class CountsInactiveRanks(AveragesGradients):
    def average(self, array: Array, partial_average: PartialAverage | None) -> None:
        array[:] = self.mean(array)


class AveragesParametersToo(AveragesGradients):
    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        super().average_gradients(partial_average)
        for buffer in self.parameters:
            self.mix(buffer.parameters)


class MixesToo(AveragesGradients):
    def after_step(self) -> None:
        HalfwayToMean.after_step(self)


def halfway(kind: type[HalfwayToMean]) -> Any:
    """A description of mixing that binds this class."""

    @dataclass(frozen=True)
    class Wrong(Halfway):
        bound: ClassVar[type[HalfwayToMean]] = kind

    return Wrong


def averaging(kind: type[HalfwayToMean]) -> Any:
    """A description of averaged gradients that binds this class."""

    @dataclass(frozen=True)
    class Wrong(Halfway):
        averages_gradients: ClassVar[bool] = True
        mixes_parameters: ClassVar[bool] = False
        bound: ClassVar[type[HalfwayToMean]] = kind

    return Wrong


@dataclass(frozen=True)
class SendsInSecret(Halfway):
    communicates: ClassVar[bool] = False
    mixes_parameters: ClassVar[bool] = False
    bound: ClassVar[type[HalfwayToMean]] = ChangesNothing


# --- wrong hooks of the optional protocols, in gossip -----------------------------------------------------------------


class PreparesWithoutWaiting(PushSum):
    def wait_in_flight(self) -> None:
        return


class ForgetsTheConsensus(PushSum):
    has_begun = False

    def adopt_consensus(self) -> None:
        if not self.has_begun:
            super().adopt_consensus()
        self.has_begun = True


class RoundsTheConsensus(PushSum):
    has_begun = False

    def adopt_consensus(self) -> None:
        if self.has_begun and self._transport.rank == 1:
            self._model[0][:] = np.nextafter(self._model[0], np.float32(np.inf))
        self.has_begun = True
        super().adopt_consensus()


class RoundsWhenPreparing(PushSum):
    def prepare_average(self) -> None:
        super().prepare_average()
        self._model[0][:] = np.nextafter(self._model[0], np.float32(np.inf))


class LeavesThePreparedAverage(PushSum):
    def abort_average(self) -> None:
        return


class BreaksStepsByAborting(PushSum):
    def abort_average(self) -> None:
        super().abort_average()
        self.weight = 1.0


class ForgetsTheChange(PushSum):
    def rebase_on_model(self) -> None:
        return


class ForgetsMessages(PushSum):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "under_way": []}


class SavesASet(PushSum):
    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "ranks": {0}}


class SendsNaN(PushSum):
    def drop_non_finite(self) -> None:
        return


class ExchangesTooEarly(PushSum):
    def resume_after_failure(self, begun_exchanges: int, most_begun: int) -> None:
        super().resume_after_failure(begun_exchanges, begun_exchanges)


class RecoversTheWrongParameters(PushSum):
    def resume_after_failure(self, begun_exchanges: int, most_begun: int) -> None:
        super().resume_after_failure(begun_exchanges, most_begun)
        self.weight = 0.5


class PreparesTheModel(PushSum):
    def prepared_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> Sequence[Array]:
        return parameters


class KeepsTheOldState(PushSum):
    def state_for_average(self, state: dict[str, Any], parameters: Sequence[Array]) -> dict[str, Any]:
        return {**state, "under_way": []}


def gossip(kind: type[PushSum], staleness_steps: int = 1) -> Any:
    """A description of OSGP that binds this class."""

    @dataclass(frozen=True)
    class Wrong:
        averages_gradients: ClassVar[bool] = False
        communicates: ClassVar[bool] = True
        mixes_parameters: ClassVar[bool] = True
        topology: Topology = field(default_factory=Uneven)

        def bind(
            self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
        ) -> BoundAlgorithm:
            return kind(transport, parameters, self.topology.for_size(transport.size), staleness_steps)

    return Wrong


WRONG = {
    "no declaration": (WithoutDeclaration, "communicates must be True or False, found None"),
    "descriptions that differ": (NotComparable, "descriptions of equal settings must be equal"),
    "contradiction": (
        Contradictory,
        "communicates is False, but averages_gradients is False and mixes_parameters is True",
    ),
    "bind changes": (ChangesBuffersWhenBound, "bind must not change the buffers"),
    "no step hook": (WithoutStepHook, "Bound lacks the step hook after_step"),
    "part of a protocol": (
        halfway(PreparesAndCannotAbort),
        "PreparesAndCannotAbort has prepare_average of the protocol OuterAverageHooks, but not wait_in_flight, abort",
    ),
    "secret messages": (SendsInSecret, "communicates is False, but the steps sent"),
    "no messages": (halfway(SendsNothing), "communicates is True, but 4 steps sent nothing"),
    "sum of gradients": (averaging(SumsGradients), "after average_gradients(), expected the mean"),
    "gradients by rank": (averaging(RoundsGradientsByRank), "ranks 0 and 1 have different bits"),
    "inactive ranks count": (
        averaging(CountsInactiveRanks),
        "PartialAverage that leaves out rank 0, expected the mean",
    ),
    "parameters averaged": (averaging(AveragesParametersToo), "average_gradients must not change parameters"),
    "undeclared mixing": (averaging(MixesToo), "mixes_parameters is False, but steps changed the parameters"),
    "no mixing": (halfway(ChangesNothing), "mixes_parameters is True, but steps left all parameters as they were"),
    "statistics mixed": (halfway(MixesStatistics), "after_step must not change the statistics"),
    "decay without others": (
        halfway(DecaysAlone),
        "without other ranks, gradients and parameters must stay bit-identical",
    ),
    "lost mass": (halfway(LosesMass), "the mean over ranks must be conserved by mixing"),
    "shift": (halfway(ShiftsInPlaceOfMixing), "mixing must bring the replicas closer to each other"),
    "messages left in flight": (gossip(PreparesWithoutWaiting), "messages in flight included"),
    "consensus forgotten": (
        gossip(ForgetsTheConsensus),
        "prepare_average right after adopt_consensus must leave the average as it is",
    ),
    "consensus by rank": (gossip(RoundsTheConsensus), "after adopt_consensus, rank 1 does not have the average"),
    "prepared with rounding": (
        gossip(RoundsWhenPreparing),
        "must leave the average as it is, bit by bit, but does not",
    ),
    "not aborted": (gossip(LeavesThePreparedAverage), "abort_average must restore the parameters, bit by bit"),
    "broken by abort": (
        gossip(BreaksStepsByAborting),
        "steps after abort_average must be those without prepare_average",
    ),
    "change forgotten": (gossip(ForgetsTheChange), "after rebase_on_model, the mean must be that of the changed"),
    "messages not saved": (gossip(ForgetsMessages), "a run resumed from state_dict must be bit-identical"),
    "state with a set": (gossip(SavesASet), "state['ranks'] is a set"),
    "NaN sent": (gossip(SendsNaN, 0), "after drop_non_finite on rank 0, its values must not reach other ranks"),
    "exchange too early": (
        gossip(ExchangesTooEarly),
        "steps that another rank has begun already must send nothing",
    ),
    "recovery of other parameters": (
        gossip(RecoversTheWrongParameters),
        "after resume_after_failure, the mean must be that of the remaining ranks' parameters",
    ),
    "model as prepared average": (gossip(PreparesTheModel), "prepared_average must return what prepare_average left"),
    "old state": (gossip(KeepsTheOldState), "must be continued from the average, but prepare_average changes it"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_base_algorithm_is_rejected(name: str) -> None:
    make_base, message = WRONG[name]
    with pytest.raises(AssertionError, match=re.escape(message)):
        check_base_algorithm(make_base, sizes=(1, 2, 3), timeout_seconds=5.0)


@pytest.mark.slow
def test_a_right_averaging_of_gradients_is_accepted() -> None:
    """The wrong ones above differ from it in one method."""
    check_base_algorithm(averaging(AveragesGradients))


def test_ranks_that_wait_forever_are_given_up() -> None:
    class Waits(HalfwayToMean):
        def after_step(self) -> None:
            if self.transport.rank == 0:
                self.transport.exchange([], [(1, np.empty(1))]).wait()

    with pytest.raises(AssertionError, match=r"on 2 ranks: TransportError: waited 0\.3 s for a "):
        check_base_algorithm(halfway(Waits), sizes=(2,), timeout_seconds=0.3)
