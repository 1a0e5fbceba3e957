"""Periods that users write: they may send numbers with the control messages, and must decide alike on all ranks."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from numpy_model import Worker

from lentando.comm.agreement import Event, Participant
from lentando.comm.errors import ConfigurationError, MismatchError
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm, BoundAlgorithm
from lentando.optimizers.rules.gossip import OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.period import Period, PostLocal, RoundSummary
from lentando.optimizers.rules.settings import Settings


class Own:
    """Rounds of the given lengths, the last of which is repeated."""

    def __init__(self, *lengths: Any) -> None:
        self.lengths = lengths
        self.rounds = 0

    def describe(self) -> str:
        return "compared by no attribute"

    def steps(self) -> int:
        length: int = self.lengths[min(self.rounds, len(self.lengths) - 1)]
        return length

    def update(self, summary: RoundSummary) -> None:
        self.rounds += 1

    def state_dict(self) -> dict[str, Any]:
        return {"rounds": self.rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rounds = state["rounds"]


class ByTheSlowest(Own):
    """Follows a number that each rank measures itself: the largest one is the next period."""

    measured = 1

    def contribute(self, event: Event) -> Mapping[str, float]:
        return {"measured": self.measured}

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        if event is Event.ROUND:
            self.lengths = (int(by_rank["measured"].max()),)


def worker(transport: Transport, period: Period, base: BaseAlgorithm = LocalSGD()) -> Worker:
    return Worker(transport, lambda *_: np.zeros(4), np.zeros(4), lambda _: 0.1, base=base, period=period)


@pytest.mark.parametrize("base", [LocalSGD(), AllReduce(), SGP(), OSGP()], ids=repr)
def test_different_lengths_are_an_error_on_every_rank_before_the_round(
    transport: Transport, base: BaseAlgorithm
) -> None:
    """With gossip, the rank with the shorter round would wait in the outer step, and its neighbours for its message."""
    own = worker(transport, Own(3, 4 + (transport.rank == transport.size - 1)), base)
    if transport.size == 1:
        own.run(10)
        return
    own.run(2)
    with pytest.raises(MismatchError, match=r"rank.*begins a round of 4 inner steps.*begins a round of 5 inner steps"):
        own.run(1)
    assert own.replica.rounds == 1


def test_the_first_round_is_compared_too(transport: Transport) -> None:
    if transport.size > 1:
        with pytest.raises(MismatchError, match="begins a round of 2 inner steps"):
            worker(transport, Own(2 + (transport.rank == 0)), SGP())


@pytest.mark.parametrize("wrong", [0, 2.5, "four", None])
def test_a_length_that_is_no_positive_integer_is_an_error_on_every_rank(transport: Transport, wrong: Any) -> None:
    with pytest.raises(ConfigurationError, match=r"steps\(\) of the period returns must be an integer >= 1"):
        worker(transport, Own(wrong))


def test_equal_lengths_of_different_types_are_equal(transport: Transport) -> None:
    own = worker(transport, Own(np.int64(2) if transport.rank else 2), SGP())
    own.run(6)
    assert own.replica.rounds == 3


@pytest.mark.parametrize("warmup", [0, 3])
def test_a_period_may_take_part_in_the_control_messages(transport: Transport, warmup: int) -> None:
    own = worker(transport, PostLocal(warmup, ByTheSlowest(1)) if warmup else ByTheSlowest(1), SGP())
    schedule: Any = own.replica.progress.period
    live = schedule.following if warmup else schedule
    assert isinstance(live, Participant)
    lengths = []
    for number in range(4):
        live.measured = 1 + (transport.rank + number) % transport.size
        before = own.replica.rounds
        taken = 0
        while own.replica.rounds == before:
            own.run(1)
            taken += 1
        lengths.append(taken)
    assert lengths == ([1, 1, 1, transport.size] if warmup == 3 else [1, *[transport.size] * 3])


class Reports(Own):
    """Attaches numbers of the given names to the messages of outer steps."""

    def __init__(self, *names: str) -> None:
        super().__init__(1)
        self.names = names
        self.received: list[dict[str, list[float]]] = []

    def contribute(self, event: Event) -> Mapping[str, float]:
        return dict.fromkeys(self.names, 0.5) if event is Event.ROUND else {}

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        if event is Event.ROUND:
            self.received.append({name: by_rank[name].tolist() for name in self.names})


@dataclass(frozen=True)
class Covering(LocalSGD):
    """A base algorithm that attaches a number to every message, as overlapped gradients do."""

    def bind(self, *arguments: Any) -> BoundAlgorithm:
        class Bound(BoundAlgorithm):
            def contribute(self, event: Event) -> Mapping[str, float]:
                return {"coverage": 1.0}

            def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
                return

        return Bound()


@pytest.mark.parametrize("name", ["loss", "rate", "seconds", "is_finite", "has_overflowed", "is_active", "weights_set"])
def test_a_name_that_is_in_use_is_refused_at_construction(transport: Transport, name: str) -> None:
    """The training loss of all ranks would be replaced by this number, for the report and for the period."""
    with pytest.raises(ConfigurationError, match=rf"Reports.contribute\(.*\) returns a number named '{name}'.*uses"):
        worker(transport, Reports(name))


def test_a_name_that_the_base_algorithm_uses_is_refused_too(transport: Transport) -> None:
    with pytest.raises(ConfigurationError, match=r"number named 'coverage'"):
        worker(transport, Reports("coverage"), Covering())


def test_thirteen_numbers_of_a_period_travel(transport: Transport) -> None:
    own = worker(transport, Reports(*(f"number {number}" for number in range(13))))
    own.run(1)
    live: Any = own.replica.progress.period
    assert live.received == [{f"number {number}": [0.5] * transport.size for number in range(13)}]


def test_more_numbers_than_a_message_holds_are_refused_at_construction(transport: Transport) -> None:
    with pytest.raises(ConfigurationError, match=r"at most 27 numbers, and 28 .* Event.ROUND \(.*Reports 14\)"):
        worker(transport, Reports(*(f"number {number}" for number in range(14))))


def test_a_name_that_is_used_later_is_refused_on_every_rank(transport: Transport) -> None:
    own = worker(transport, Reports())
    live: Any = own.replica.progress.period
    live.names = ("loss",)
    with pytest.raises(ConfigurationError, match=r"returns a number named 'loss' on rank"):
        own.run(1)
    assert own.replica.rounds == 0


def test_a_period_that_takes_part_needs_the_exact_average() -> None:
    with pytest.raises(ConfigurationError, match="decides by what all ranks report"):
        Settings(SGP(), period=ByTheSlowest(1), outer=None, exact_average=False)
