"""The ring and the backend over a real MPI."""

from typing import Any, Literal

import numpy as np
import pytest
from numpy.typing import DTypeLike
from operation_checks import bits_on_each_rank
from ring_reference import along_the_ring, values_by_rank

from lentando.comm.collectives import all_reduce, plan_reduction
from lentando.comm.dtypes import accumulator_dtype, bfloat16
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.ring import RingReduction, Segments
from lentando.comm.transport import Transport

ALGORITHMS = ("ring", "backend")
FLOATS = (np.float32, np.float64, np.float16, bfloat16)
LENGTHS = (0, 1, 3, 7, 1003)

Algorithm = Literal["ring", "backend"]


@pytest.mark.parametrize("mean", [False, True])
@pytest.mark.parametrize("elements", LENGTHS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_ring_equals_the_sum_along_its_path_bit_identically(
    transport: Transport, dtype: DTypeLike, elements: int, mean: bool
) -> None:
    """O60: on every rank, also with fewer elements than ranks, or none; half precision is summed in float32."""
    by_rank = values_by_rank(transport.size, elements, dtype)
    array = by_rank[transport.rank].copy()
    all_reduce(transport, array, mean=mean, algorithm="ring")
    assert bits_on_each_rank(transport, array) == {along_the_ring(by_rank, mean=mean).tobytes()}


@pytest.mark.parametrize("dtype", FLOATS)
def test_engine_gives_every_rank_the_same_bits(transport: Transport, dtype: DTypeLike) -> None:
    array = values_by_rank(transport.size, 1003, dtype)[transport.rank]
    all_reduce(transport, array, mean=True, algorithm="backend")
    assert len(bits_on_each_rank(transport, array)) == 1


@pytest.mark.parametrize("dtype", FLOATS)
def test_ring_and_engine_differ_by_rounding_only(transport: Transport, dtype: DTypeLike) -> None:
    """O60: each is within the error bound of a sum of n terms, plus the one rounding to the dtype."""
    by_rank = values_by_rank(transport.size, 1003, dtype)
    by_ring, by_backend = (by_rank[transport.rank].copy() for _ in range(2))
    all_reduce(transport, by_ring, algorithm="ring")
    all_reduce(transport, by_backend, algorithm="backend")
    wide = accumulator_dtype(np.dtype(dtype))
    precision = {"float16": 2.0**-11, "bfloat16": 2.0**-8}.get(np.dtype(dtype).name, 0.0)
    magnitude = np.sum([np.abs(values.astype(np.float64)) for values in by_rank], axis=0)
    bound = 2 * (transport.size * float(np.finfo(wide).eps) + precision) * magnitude
    assert (np.abs(by_ring.astype(np.float64) - by_backend.astype(np.float64)) <= bound).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("elements", LENGTHS)
@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.float32, np.float64])
def test_sums_of_integers_are_exact(
    transport: Transport, algorithm: Algorithm, elements: int, dtype: DTypeLike
) -> None:
    """O60: below 2**24 in float32."""
    by_rank = [np.random.default_rng(rank).integers(-(2**20), 2**20, elements) for rank in range(transport.size)]
    array = by_rank[transport.rank].astype(dtype)
    all_reduce(transport, array, algorithm=algorithm)
    assert array.tolist() == np.sum(by_rank, axis=0).tolist()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_sum_of_ones_is_the_number_of_ranks(transport: Transport, algorithm: Algorithm, dtype: DTypeLike) -> None:
    """O61."""
    array = np.ones(5, dtype)
    all_reduce(transport, array, algorithm=algorithm)
    assert array.tolist() == [transport.size] * 5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_mean_of_the_ranks_is_half_of_the_last(transport: Transport, algorithm: Algorithm, dtype: DTypeLike) -> None:
    """O61: (n-1)/2."""
    array = np.full(5, transport.rank, dtype)
    all_reduce(transport, array, mean=True, algorithm=algorithm)
    assert array.tolist() == [(transport.size - 1) / 2] * 5


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", FLOATS)
def test_nan_of_one_rank_reaches_all(transport: Transport, algorithm: Algorithm, dtype: DTypeLike) -> None:
    """O61: and spoils no other element."""
    array = np.ones(7, dtype)
    if transport.rank == transport.size - 1:
        array[3] = np.nan
    all_reduce(transport, array, mean=True, algorithm=algorithm)
    assert np.isnan(array.astype(np.float32)).tolist() == [False, False, False, True, False, False, False]


def traffic_of_ring(transport: Transport, elements: int, segment_bytes: int = 2**20) -> tuple[list[int], list[int]]:
    """Elements sent and messages sent in one all-reduce, by rank, counted at the transport."""
    reduction = RingReduction(transport, np.ones(elements, np.float32), Segments(segment_bytes))
    before = transport.traffic.copy()
    reduction.all_reduce(mean=False)
    assert transport.traffic.collectives == before.collectives
    sent = transport.traffic.bytes_sent - before.bytes_sent
    messages = transport.traffic.messages - before.messages
    counted = transport.allgather(np.array([sent, messages]))
    assert (counted[:, 0] % 4 == 0).all()
    return (counted[:, 0] // 4).tolist(), counted[:, 1].tolist()


@pytest.mark.parametrize("elements", [0, 1, 3, 120, 1003])
def test_ring_sends_all_but_two_chunks_of_twice_the_buffer(transport: Transport, elements: int) -> None:
    """O58: 2 S - |chunk r+1| - |chunk r+2| on rank r, 2(n-1) S over all; 2(n-1)/n S where n divides S."""
    size = transport.size
    sent, _ = traffic_of_ring(transport, elements)
    lengths = [part.size for part in np.array_split(np.arange(elements), size)]
    assert sent == [2 * elements - lengths[(r + 1) % size] - lengths[(r + 2) % size] for r in range(size)]
    assert sum(sent) == 2 * (size - 1) * elements
    if elements % size == 0:
        assert sent == [2 * (size - 1) * elements // size] * size


@pytest.mark.parametrize(
    ("size", "elements", "expected"), [(4, 1003, [1504, 1505, 1505, 1504]), (8, 3, [4, 5, 6, 6, 6, 6, 5, 4])]
)
def test_ring_sends_the_listed_figures(transport: Transport, size: int, elements: int, expected: list[int]) -> None:
    """O58."""
    if transport.size != size:
        pytest.skip(f"the figures are those of {size} ranks")
    assert traffic_of_ring(transport, elements)[0] == expected


def test_ring_takes_two_times_n_minus_one_messages(transport: Transport) -> None:
    """O59: one per step when a chunk is one segment; none in a world of one."""
    _, messages = traffic_of_ring(transport, 1003)
    assert messages == [2 * (transport.size - 1)] * transport.size


def test_ring_sends_each_segment_once_per_step(transport: Transport) -> None:
    """O59: three segments of 4 elements, where chunks have 12."""
    _, messages = traffic_of_ring(transport, 12 * transport.size, segment_bytes=16)
    assert messages == [3 * 2 * (transport.size - 1)] * transport.size


def test_empty_chunks_are_no_messages(transport: Transport) -> None:
    """O59: with one element, each rank passes on at most one partial sum and one result."""
    sent, messages = traffic_of_ring(transport, 1)
    assert messages == sent
    assert traffic_of_ring(transport, 0) == ([0] * transport.size, [0] * transport.size)


@pytest.mark.parametrize("segment_elements", [1, 2, 3])
def test_tiny_segments_do_not_touch_each_other(transport: Transport, segment_elements: int) -> None:
    """Every remainder of elements over ranks, so that chunks differ by one element."""
    for elements in range(6 * transport.size, 7 * transport.size + 1):
        check_sum_along_the_ring(transport, elements, 4 * segment_elements)


@pytest.mark.parametrize("count", [2, 3, 4, 5])
def test_large_segments_do_not_touch_each_other(transport: Transport, count: int) -> None:
    """As above, with messages that MPI does not copy aside: it reads scratch memory while the next ones are written."""
    for elements in (64_001, 64_003):
        longest = -(-elements // transport.size)
        check_sum_along_the_ring(transport, elements, 4 * -(-longest // count))


def check_sum_along_the_ring(transport: Transport, elements: int, segment_bytes: int) -> None:
    by_rank = values_by_rank(transport.size, elements, np.float32)
    array = by_rank[transport.rank].copy()
    RingReduction(transport, array, Segments(segment_bytes)).all_reduce(mean=False)
    assert np.array_equal(array, along_the_ring(by_rank, mean=False))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize(("tensors", "segment"), [([6, 6], 10), ([12], 10), ([3, 3, 3, 3], 5)])
def test_every_tensor_of_a_flat_buffer_is_reduced_exactly_once(
    transport: Transport, algorithm: Algorithm, tensors: list[int], segment: int
) -> None:
    """O63: each element counts its ranks in binary, so that one that is missing or added twice shows."""
    flat = np.full(sum(tensors), 2.0**transport.rank, np.float32)
    if algorithm == "ring":
        RingReduction(transport, flat, Segments(4 * segment)).all_reduce(mean=False)
    else:
        all_reduce(transport, flat, algorithm=algorithm)
    for tensor in np.split(flat, np.cumsum(tensors)[:-1]):
        assert (tensor == 2.0**transport.size - 1).all()


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("elements", LENGTHS)
def test_what_ranks_make_of_their_shards_is_handed_out(
    transport: Transport, algorithm: Algorithm, dtype: DTypeLike, elements: int
) -> None:
    """The outer step: between the halves, each rank replaces its shard by something of its own."""
    buffer = np.full(elements, transport.rank, dtype)
    reduction = plan_reduction(transport, buffer, algorithm)
    total = reduction.reduce_scatter()
    assert total.dtype == accumulator_dtype(np.dtype(dtype))
    assert (total == sum(range(transport.size))).all()
    assert (buffer == transport.rank).all()
    buffer[reduction.shard] = total + transport.rank
    reduction.all_gather()
    expected = np.empty(elements, dtype)
    for rank in range(transport.size):
        expected[ring_schedule.shard(rank, transport.size, elements)] = sum(range(transport.size)) + rank
    assert np.array_equal(buffer, expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_plan_serves_every_round(transport: Transport, algorithm: Algorithm) -> None:
    buffer: Any = np.empty(1003, np.float32)
    reduction = plan_reduction(transport, buffer, algorithm)
    for value in range(5):
        buffer[...] = value * (transport.rank + 1)
        reduction.all_reduce(mean=False)
        assert (buffer == value * sum(range(1, transport.size + 1))).all()
