"""The arithmetic of the ring, executed in one process: all ranks take each hop together."""

from collections.abc import Callable, Iterator

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.ring_schedule import Hop
from lentando.comm.transport import Array

sizes = st.integers(1, 17)
lengths = st.integers(0, 120)
segment_lengths = st.integers(1, 130)


def elements_in(part: slice) -> int:
    return int(part.stop - part.start)


def in_lockstep(
    hops: Callable[..., Iterator[Hop]], size: int, elements: int, longest: int
) -> Iterator[tuple[Hop, ...]]:
    """Each hop as all ranks see it, by rank."""
    count = ring_schedule.segments(size, elements, longest)
    return zip(*(hops(rank, size, elements, count) for rank in range(size)), strict=True)


def sums_of_contributions(size: int, elements: int, longest: int) -> Array:
    """After reduce-scatter, how often each rank's value is in each element: indices are holder, element, rank."""
    held = np.repeat(np.eye(size, dtype=int)[:, np.newaxis, :], elements, axis=1)
    for hops in in_lockstep(ring_schedule.reduce_hops, size, elements, longest):
        on_the_way = [held[rank, hops[rank].send].copy() for rank in range(size)]
        for rank in range(size):
            held[rank, hops[rank].receive] += on_the_way[rank - 1]
    return held


@given(sizes, lengths, segment_lengths)
def test_every_element_is_reduced_exactly_once_for_any_sizes(size: int, elements: int, longest: int) -> None:
    """O63: every value of every rank is in the finished sum once, however the buffer is cut."""
    held = sums_of_contributions(size, elements, longest)
    for rank in range(size):
        assert (held[rank, ring_schedule.shard(rank, size, elements)] == 1).all()


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize(("tensors", "longest"), [([6, 6], 10), ([12], 10), ([3, 3, 3, 3], 5)])
def test_every_tensor_is_reduced_exactly_once(size: int, tensors: list[int], longest: int) -> None:
    """O63: the listed sizes of tensors and segments."""
    elements = sum(tensors)
    held = sums_of_contributions(size, elements, longest)
    finished = np.concatenate([held[(c - 1) % size, ring_schedule.chunk(c, size, elements)] for c in range(size)])
    for tensor in np.split(finished, np.cumsum(tensors)[:-1]):
        assert (tensor == 1).all()


@given(sizes, lengths, segment_lengths)
def test_all_gather_hands_every_shard_to_every_rank(size: int, elements: int, longest: int) -> None:
    held = np.zeros((size, elements), int)
    for rank in range(size):
        part = ring_schedule.shard(rank, size, elements)
        held[rank, part] = np.arange(part.start, part.stop) + 1
    for hops in in_lockstep(ring_schedule.gather_hops, size, elements, longest):
        on_the_way = [held[rank, hops[rank].send].copy() for rank in range(size)]
        for rank in range(size):
            held[rank, hops[rank].receive] = on_the_way[rank - 1]
    assert (held == np.arange(elements) + 1).all()


@given(sizes, lengths, segment_lengths)
def test_what_a_rank_sends_is_what_the_next_one_expects(size: int, elements: int, longest: int) -> None:
    for hops_of in (ring_schedule.reduce_hops, ring_schedule.gather_hops):
        for hops in in_lockstep(hops_of, size, elements, longest):
            for rank in range(size):
                assert hops[rank].receive == hops[rank - 1].send
                assert elements_in(hops[rank].send) <= longest


@given(sizes, lengths)
def test_chunks_partition_the_buffer_into_parts_that_differ_by_at_most_one(size: int, elements: int) -> None:
    chunks = [ring_schedule.chunk(number, size, elements) for number in range(size)]
    assert [part.start for part in chunks] == [0, *(part.stop for part in chunks[:-1])]
    assert chunks[-1].stop == elements
    assert max(map(elements_in, chunks)) - min(map(elements_in, chunks)) <= 1


@given(sizes, lengths, segment_lengths)
def test_segments_of_different_number_never_share_scratch_memory(size: int, elements: int, longest: int) -> None:
    """A segment lies in scratch memory at its distance from the start of its chunk.

    Regression: chunks that differ by one element were once cut at different distances, so that one segment was received
    over the edge of another that was still being sent.
    """
    count = ring_schedule.segments(size, elements, longest)
    for rank in range(size):
        used: list[set[int]] = [set() for _ in range(count)]
        for hop in ring_schedule.reduce_hops(rank, size, elements, count):
            start = ring_schedule.chunk(rank - 1 - hop.step, size, elements).start
            used[hop.segment].update(range(hop.receive.start - start, hop.receive.stop - start))
        assert sum(map(len, used)) == len(set().union(*used))


def elements_sent(size: int, elements: int, longest: int) -> list[int]:
    """Elements that each rank sends in both halves together."""
    count = ring_schedule.segments(size, elements, longest)
    return [
        sum(
            elements_in(hop.send)
            for hops in (ring_schedule.reduce_hops, ring_schedule.gather_hops)
            for hop in hops(rank, size, elements, count)
        )
        for rank in range(size)
    ]


@pytest.mark.parametrize(
    ("size", "elements", "expected"),
    [
        (4, 1003, [1504, 1505, 1505, 1504]),
        (8, 3, [4, 5, 6, 6, 6, 6, 5, 4]),
        (4, 1000, [1500] * 4),
        (5, 0, [0] * 5),
        (1, 1003, [0]),
    ],
)
def test_elements_sent_by_each_rank(size: int, elements: int, expected: list[int]) -> None:
    """O58: the listed figures; 2(n-1)/n S where n divides S."""
    assert elements_sent(size, elements, longest=64) == expected


@given(sizes, lengths, segment_lengths)
def test_elements_sent_are_the_least_that_an_all_reduce_can_send(size: int, elements: int, longest: int) -> None:
    """O58: 2(n-1) S over all ranks, exactly; each rank all but two chunks of 2 S."""
    sent = elements_sent(size, elements, longest)
    assert sum(sent) == 2 * (size - 1) * elements
    for rank in range(size):
        spared = [elements_in(ring_schedule.chunk(rank + ahead, size, elements)) for ahead in (1, 2)]
        assert sent[rank] == 2 * elements - sum(spared)


@given(sizes, lengths, segment_lengths)
def test_ring_takes_two_times_n_minus_one_steps(size: int, elements: int, longest: int) -> None:
    """O59: and every step moves each segment once."""
    count = ring_schedule.segments(size, elements, longest)
    for rank in range(size):
        for hops in (ring_schedule.reduce_hops, ring_schedule.gather_hops):
            taken = [(hop.step, hop.segment) for hop in hops(rank, size, elements, count)]
            assert taken == [(step, segment) for step in range(size - 1) for segment in range(count)]


@pytest.mark.parametrize("size", [2, 3, 4, 5, 8])
def test_time_model_rests_on_these_counts(size: int) -> None:
    """O62: 2(n-1) latencies and 2(n-1)/n S of bandwidth, where one-peer gossip would send S: more, from 3 ranks on."""
    elements = 40 * size
    steps = {
        (half, hop.step)
        for half, hops in enumerate((ring_schedule.reduce_hops, ring_schedule.gather_hops))
        for hop in hops(0, size, elements, 1)
    }
    assert len(steps) == 2 * (size - 1)
    assert elements_sent(size, elements, elements) == [2 * (size - 1) * elements // size] * size
    assert (elements_sent(size, elements, elements)[0] > elements) == (size > 2)
