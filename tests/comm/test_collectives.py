"""Planned reductions over ranks that are threads, for more ranks and sizes than a machine could start."""

from collections.abc import Callable
from typing import Any, Literal

import numpy as np
import pytest
from delayed_transport import run_ranks_with_delays
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import DTypeLike
from ring_reference import along_the_ring, values_by_rank

from lentando.comm.collectives import all_reduce, plan_reduction
from lentando.comm.dtypes import accumulator_dtype, bfloat16
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.backend import BackendReduction
from lentando.comm.reductions.none import NoReduction
from lentando.comm.reductions.plan import RING_FROM_BYTES
from lentando.comm.reductions.reduction import store
from lentando.comm.reductions.ring import RingReduction, Segments
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transport import Array
from lentando.comm.transports.single import SingleTransport

FLOATS = (np.float32, np.float64, np.float16, bfloat16)


def bits(array: Array) -> bytes:
    return array.tobytes()


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 17),
    st.integers(0, 80),
    st.integers(1, 90),
    st.integers(1, 9),
    st.sampled_from(FLOATS),
    st.booleans(),
)
def test_ring_equals_the_sum_along_its_path_bit_identically(
    size: int, elements: int, longest: int, in_flight: int, dtype: DTypeLike, mean: bool
) -> None:
    """O60: on every rank, for any number of ranks, elements and segments, whole and by its halves."""
    by_rank = values_by_rank(size, elements, dtype)
    segment_bytes = longest * accumulator_dtype(np.dtype(dtype)).itemsize

    def reduce(transport: ThreadTransport) -> Array:
        buffer = by_rank[transport.rank].copy()
        reduction = RingReduction(transport, buffer, Segments(segment_bytes, in_flight))
        reduction.all_reduce(mean)
        whole = buffer.copy()
        buffer[...] = by_rank[transport.rank]
        store(reduction.reduce_scatter(), buffer[reduction.shard], size if mean else 1)
        reduction.all_gather()
        return np.stack([whole, buffer])

    expected = along_the_ring(by_rank, mean=mean)
    assert {bits(result) for result in run_ranks(size, reduce)} == {bits(np.stack([expected, expected]))}


@pytest.mark.slow
@settings(deadline=None, max_examples=60)
@given(st.integers(1, 9), st.integers(0, 80), st.integers(1, 30), st.integers(1, 9), st.sampled_from(FLOATS))
@example(4, 5, 1, 4, np.float32)
@example(4, 14, 1, 4, np.float32)
def test_ring_reuses_no_memory_that_is_still_on_its_way(
    size: int, elements: int, longest: int, in_flight: int, dtype: DTypeLike
) -> None:
    """Regression, the two examples: scratch memory of neighbouring segments overlapped where chunks differ by one."""
    by_rank = values_by_rank(size, elements, dtype)
    segment_bytes = longest * accumulator_dtype(np.dtype(dtype)).itemsize

    def reduce(transport: ThreadTransport) -> Array:
        buffer = by_rank[transport.rank].copy()
        RingReduction(transport, buffer, Segments(segment_bytes, in_flight)).all_reduce(mean=False)
        return buffer

    expected = along_the_ring(by_rank, mean=False)
    assert {bits(result) for result in run_ranks_with_delays(size, reduce)} == {bits(expected)}


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_shards_partition_the_buffer(algorithm: Literal["ring", "backend"]) -> None:
    def shard(transport: ThreadTransport) -> slice:
        return plan_reduction(transport, np.zeros(11, np.float32), algorithm).shard

    owned = [element for part in run_ranks(4, shard) for element in range(part.start, part.stop)]
    assert sorted(owned) == list(range(11))


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_reduce_scatter_leaves_the_buffer_as_it_was(algorithm: Literal["ring", "backend"]) -> None:
    def unchanged(transport: ThreadTransport) -> bool:
        buffer = np.full(11, transport.rank, np.float16)
        plan_reduction(transport, buffer, algorithm).reduce_scatter()
        return bool((buffer == transport.rank).all())

    assert all(run_ranks(4, unchanged))


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_sum_of_a_shard_is_in_float32_whatever_the_buffer_is(algorithm: Literal["ring", "backend"]) -> None:
    """2048 + 1 + 1 + 1 is 2051 in float32; added one by one in float16, it stays at 2048."""

    def total(transport: ThreadTransport) -> list[float]:
        buffer = np.full(8, 1 if transport.rank else 2048, np.float16)
        result = plan_reduction(transport, buffer, algorithm).reduce_scatter()
        assert result.dtype == np.float32
        return list(result)

    assert run_ranks(4, total) == [[2051.0, 2051.0]] * 4


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_values_that_are_not_finite_reach_every_rank_without_a_warning(algorithm: Literal["ring", "backend"]) -> None:
    """O61: infinities of both signs, and a sum that is too large for its dtype."""

    def total(transport: ThreadTransport) -> list[float]:
        buffer = np.array([1, np.inf, -np.inf if transport.rank else np.inf, np.nan, 60000], np.float16)
        all_reduce(transport, buffer, algorithm=algorithm)
        return [float(value) for value in buffer]

    results = run_ranks(3, total)
    assert repr(results) == repr([[3.0, np.inf, np.nan, np.nan, np.inf]] * 3)


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
@pytest.mark.parametrize("elements", [0, 2, 11])
def test_all_gather_hands_out_what_ranks_made_of_their_shards(
    algorithm: Literal["ring", "backend"], elements: int
) -> None:
    def outer_step(transport: ThreadTransport) -> list[float]:
        buffer = np.ones(elements, np.float32)
        reduction = plan_reduction(transport, buffer, algorithm)
        reduction.reduce_scatter()
        buffer[reduction.shard] = 100 + transport.rank
        reduction.all_gather()
        return buffer.tolist()

    expected = np.empty(elements)
    for rank in range(4):
        expected[ring_schedule.shard(rank, 4, elements)] = 100 + rank
    assert run_ranks(4, outer_step) == [expected.tolist()] * 4


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_plan_can_be_executed_again(algorithm: Literal["ring", "backend"]) -> None:
    def twice(transport: ThreadTransport) -> list[list[float]]:
        buffer = np.empty(11, np.float32)
        reduction = plan_reduction(transport, buffer, algorithm)
        results = []
        for value in (1, 10):
            buffer[...] = value + transport.rank
            reduction.all_reduce(mean=False)
            results.append(buffer.tolist())
        return results

    assert run_ranks(3, twice) == [[[6.0] * 11, [33.0] * 11]] * 3


def test_no_reduction_owns_the_whole_buffer_and_sends_nothing() -> None:
    buffer = np.arange(5, dtype=np.float16)
    reduction = NoReduction(buffer)
    assert reduction.shard == slice(0, 5)
    total = reduction.reduce_scatter()
    assert total.dtype == np.float32
    assert total.tolist() == [0, 1, 2, 3, 4]
    reduction.all_gather()
    reduction.all_reduce(mean=True)
    assert buffer.tolist() == [0, 1, 2, 3, 4]


def plans_for(size: int, nbytes: int, local_size: int) -> list[type[Any]]:
    """What ``auto`` chooses on each rank."""

    def plan(transport: ThreadTransport) -> type[Any]:
        transport.local_size = local_size
        return type(plan_reduction(transport, np.zeros(nbytes, np.uint8)))

    return run_ranks(size, plan)


@pytest.mark.slow
@pytest.mark.parametrize(("place", "local_size"), [("one node", 2), ("several nodes", 1)])
def test_auto_leaves_small_buffers_to_the_backend(place: str, local_size: int) -> None:
    threshold = RING_FROM_BYTES[place]
    assert plans_for(2, threshold - 1, local_size) == [BackendReduction] * 2
    assert plans_for(2, threshold, local_size) == [RingReduction] * 2


def test_auto_needs_no_engine_in_a_world_of_one() -> None:
    transport = SingleTransport()
    buffer = np.ones(3, np.float32)
    plan_reduction(transport, buffer).all_reduce(mean=True)
    assert buffer.tolist() == [1, 1, 1]
    assert transport.traffic == SingleTransport().traffic


@pytest.mark.parametrize(
    ("buffer", "algorithm", "reason"),
    [
        (np.zeros((2, 2)), "auto", "a contiguous one-dimensional array, got shape"),
        (np.zeros(8)[::2], "auto", "a contiguous one-dimensional array, got shape"),
        (np.zeros(2, complex), "ring", "cannot reduce arrays of complex128"),
        (np.zeros(2, bool), "backend", "cannot reduce arrays of bool"),
        (np.zeros(2), "tree", "algorithm must be 'auto', 'measured', 'ring' or 'backend', got 'tree'"),
    ],
)
def test_plan_refuses(buffer: Array, algorithm: Any, reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        plan_reduction(SingleTransport(), buffer, algorithm)


def test_all_reduce_works_in_place_on_any_shape() -> None:
    def total(transport: ThreadTransport) -> list[list[float]]:
        array = np.full((2, 3), transport.rank, np.float32)
        all_reduce(transport, array, mean=True)
        return array.tolist()

    assert run_ranks(4, total) == [[[1.5] * 3] * 2] * 4


def test_all_reduce_refuses_the_mean_of_integers() -> None:
    with pytest.raises(ConfigurationError, match="the mean of int64 is not of that dtype"):
        all_reduce(SingleTransport(), np.zeros(2, np.int64), mean=True)


@pytest.mark.parametrize("make", [lambda: np.zeros((4, 4))[:, :2], lambda: np.zeros((2, 3), order="F")])
def test_all_reduce_refuses_an_array_that_it_could_not_change_in_place(make: Callable[[], Array]) -> None:
    with pytest.raises(ConfigurationError, match="needs a C-contiguous array"):
        all_reduce(SingleTransport(), make())
