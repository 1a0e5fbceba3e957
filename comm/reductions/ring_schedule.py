"""The schedule of a ring: which piece of a buffer each rank sends and receives at each step. Pure arithmetic.

Reduce-scatter: in step s, rank r sends its partial sum of chunk r - s to rank r + 1, and adds its own values to the
chunk r - s - 1 that it receives. After n - 1 steps it holds the whole sum of chunk r + 1, which is its shard.
All-gather: the complete chunks travel around the ring in the same direction. Each rank sends 2S - |chunk r+1| -
|chunk r+2| elements of S in 2(n - 1) steps, 2(n - 1)/n S when n divides S: the least that any all-reduce can send
(Patarasuk and Yuan, JPDC 2009). Every chunk is summed along one fixed path, starting at the rank of its own number, so
that the results of all ranks are bit-identical.
"""

from collections.abc import Iterator
from dataclasses import dataclass

__all__ = ["Hop", "chunk", "gather_hops", "reduce_hops", "segments", "shard"]


@dataclass(frozen=True)
class Hop:
    """One step of one segment around the ring, as seen by one rank.

    Attributes:
        step: ring step, from 0.
        segment: number of the segment within its chunk.
        send: range of elements sent to the next rank.
        receive: range of elements received from the previous rank.
    """

    step: int
    segment: int
    send: slice
    receive: slice


def chunk(number: int, size: int, elements: int) -> slice:
    """Range of chunk ``number`` (modulo ``size``) of a buffer in ``size`` parts that differ by 1 element at most."""
    number %= size
    base, longer = divmod(elements, size)
    start = number * base + min(number, longer)
    return slice(start, start + base + (number < longer))


def shard(rank: int, size: int, elements: int) -> slice:
    """The chunk whose sum ends at ``rank``."""
    return chunk(rank + 1, size, elements)


def segments(size: int, elements: int, longest_segment: int) -> int:
    """Number of segments per chunk: as many as the longest chunk needs, the same on every rank, at least 1."""
    return max(1, -(-_longest_chunk(size, elements) // max(1, longest_segment)))


def reduce_hops(rank: int, size: int, elements: int, count: int) -> Iterator[Hop]:
    """The transfers of ``rank`` in the reduce-scatter, in order, with ``count`` segments per chunk."""
    return _hops(rank, rank - 1, size, elements, count)


def gather_hops(rank: int, size: int, elements: int, count: int) -> Iterator[Hop]:
    """The transfers of ``rank`` in the all-gather, in order, with ``count`` segments per chunk."""
    return _hops(rank + 1, rank, size, elements, count)


def _hops(first_sent: int, first_received: int, size: int, elements: int, count: int) -> Iterator[Hop]:
    # One grid for all chunks: segment k starts at the same offset in each, however their lengths differ. Scratch memory
    # that holds segment k of one chunk is therefore never touched by another segment of the next.
    grid = -(-_longest_chunk(size, elements) // count)
    for step in range(size - 1):
        send = chunk(first_sent - step, size, elements)
        receive = chunk(first_received - step, size, elements)
        for number in range(count):
            yield Hop(step, number, _segment(send, number, grid), _segment(receive, number, grid))


def _segment(whole: slice, number: int, grid: int) -> slice:
    return slice(min(whole.start + number * grid, whole.stop), min(whole.start + (number + 1) * grid, whole.stop))


def _longest_chunk(size: int, elements: int) -> int:
    return -(-elements // size)
