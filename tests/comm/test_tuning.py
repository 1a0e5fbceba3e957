"""What is measured before an all-reduce, where, and what follows from it; over ranks that are threads."""

import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from tuned_plans import tuned_plans

from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.elastic import is_elastic
from lentando.comm.reductions import tuning
from lentando.comm.reductions.plan import ReductionPlan
from lentando.comm.reductions.ring import RingReduction, Segments
from lentando.comm.reductions.tuning import SEGMENTS_VARIABLE, TunedPlan
from lentando.comm.simulation import Network, SimulatedTransport, simulate
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transport import Message, Request

SIZE = 2
LARGE = tuning.MEASURED_FROM_BYTES // 4
"""Elements of the smallest buffer of float32 that is measured."""
DELAY_SECONDS = 0.01
"""More than a busy machine adds to the time of all messages in long segments, of which there are few."""
BACKEND = ReductionPlan("backend")
RINGS = [ReductionPlan("ring", segments) for segments in tuning.TRIED_SEGMENTS]


def on_hosts(transport: ThreadTransport) -> ThreadTransport:
    """Its ranks, each on a host of its own."""
    transport.local_rank, transport.local_size = 0, 1
    return transport


class SlowToStart(ThreadTransport):
    """On the last rank, every message costs time, however short it is."""

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        if self.rank == self.size - 1:
            time.sleep(DELAY_SECONDS)
        return super().exchange(sends, receives, tag, overlap=overlap)


class Elastic(ThreadTransport):
    """Says that it survives deaths, of which there are none here."""

    def vote(self, yes: bool) -> bool:
        return yes

    def repair(self) -> list[int]:
        return list(range(self.size))


class Horovod(ThreadTransport):
    name = "horovod"


def buffer(elements: int = LARGE) -> NDArray[np.float32]:
    return np.zeros(elements, np.float32)


def chosen_by_each(kind: type[ThreadTransport], algorithm: Algorithm = "ring") -> list[list[TunedPlan]]:
    def plan(transport: ThreadTransport) -> list[TunedPlan]:
        own = on_hosts(kind(transport.rank, transport._world))
        plan_reduction(own, buffer(), algorithm)
        return tuned_plans(own)

    return run_ranks(SIZE, plan)


def test_where_messages_are_slow_to_start_all_ranks_choose_long_segments() -> None:
    """By the times of the slowest rank, though the others' own are shorter."""
    found = chosen_by_each(SlowToStart)
    assert [choices[0].plan for choices in found] == [RINGS[-1]] * SIZE
    assert found[0] == found[1]
    assert min(found[0][0].seconds.values()) >= 2 * DELAY_SECONDS


def test_the_usual_way_stays_unless_another_is_clearly_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "CLEARLY_FASTER", float("inf"))
    (choices, _) = chosen_by_each(SlowToStart)
    assert choices[0].plan == RINGS[0]
    assert choices[0].seconds[RINGS[0]] == max(choices[0].seconds.values())


@pytest.mark.parametrize("kind", [Elastic, Horovod])
@pytest.mark.parametrize("algorithm", ["ring", "measured"])
def test_nothing_is_measured_where_ranks_may_die_or_messages_wait_for_a_cycle(
    kind: type[ThreadTransport], algorithm: Algorithm
) -> None:
    assert chosen_by_each(kind, algorithm) == [[]] * SIZE


def test_the_elastic_transport_of_these_tests_is_one() -> None:
    assert run_ranks(1, lambda transport: is_elastic(Elastic(0, transport._world))) == [True]


@pytest.mark.parametrize("algorithm", ["auto", "measured", "ring"])
def test_nothing_is_measured_in_a_simulation(algorithm: Algorithm) -> None:
    def plan(transport: SimulatedTransport) -> tuple[float, list[TunedPlan]]:
        plan_reduction(transport, buffer(), algorithm)
        return transport.clock(), tuned_plans(transport)

    assert simulate(plan, SIZE, network=Network(1e-3, 1e6)) == [(0.0, [])] * SIZE


def test_a_new_job_in_the_same_process_measures_again() -> None:
    assert all(len(choices) == 1 for _ in range(2) for choices in chosen_by_each(ThreadTransport))


def messages_planning(algorithm: Algorithm, elements: int, **how: Any) -> list[int]:
    """Sent while each rank plans."""

    def plan(transport: ThreadTransport) -> int:
        plan_reduction(on_hosts(transport), buffer(elements), algorithm, **how)
        return transport.traffic.messages + transport.traffic.collectives

    return run_ranks(SIZE, plan)


@pytest.mark.parametrize(
    ("algorithm", "elements", "how"),
    [
        ("auto", LARGE - 1, {}),
        ("ring", LARGE - 1, {"scatter_gather": True}),
        ("measured", tuning.COMPARED_FROM_BYTES // 4 - 1, {}),
        ("backend", LARGE, {}),
        ("auto", LARGE, {"once": True}),
        ("ring", LARGE, {"once": True}),
        ("measured", LARGE, {"once": True}),
    ],
)
def test_small_buffers_and_those_of_a_single_use_cost_no_message_to_plan(
    algorithm: Algorithm, elements: int, how: dict[str, Any]
) -> None:
    assert messages_planning(algorithm, elements, **how) == [0] * SIZE
    assert min(messages_planning("ring", LARGE)) > 0


@pytest.mark.parametrize("scatter_gather", [False, True])
def test_measured_compares_the_backend_too(scatter_gather: bool) -> None:
    def plan(transport: ThreadTransport) -> set[Any]:
        reductions = [
            plan_reduction(on_hosts(transport), buffer(elements), "measured", scatter_gather=scatter_gather)
            for elements in (LARGE, LARGE // 8)
        ]
        large, small = tuned_plans(transport)
        assert set(large.seconds) == {*RINGS, BACKEND}
        assert set(small.seconds) == {RINGS[0], BACKEND}
        assert [isinstance(reduction, RingReduction) for reduction in reductions] == [
            one.plan.method == "ring" for one in (large, small)
        ]
        return {large.plan, small.plan}

    first, second = run_ranks(SIZE, plan)
    assert first == second


def test_the_variable_says_what_is_otherwise_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SEGMENTS_VARIABLE, "300000x2")

    def reduce(transport: ThreadTransport) -> tuple[int, list[TunedPlan]]:
        reduction = plan_reduction(on_hosts(transport), buffer(), "ring")
        before = transport.traffic.messages
        reduction.all_reduce(mean=False)
        return transport.traffic.messages - before, tuned_plans(transport)

    segments = -(-(LARGE // SIZE) // (300_000 // 4))
    assert run_ranks(SIZE, reduce) == [(2 * segments, [])] * SIZE


def test_a_choice_reports_what_was_chosen_and_why() -> None:
    between = ReductionPlan("shared memory", Segments(1024, 2))
    made = TunedPlan("up to 32 MiB of float32", between, {RINGS[0]: 0.5, between: 0.25, BACKEND: 0.75})
    assert str(made) == (
        "up to 32 MiB of float32: shared memory, ring between nodes in segments of 1024x2 (measured: ring in segments "
        "of 262144x4 500 ms, shared memory, ring between nodes in segments of 1024x2 250 ms, backend 750 ms)"
    )
