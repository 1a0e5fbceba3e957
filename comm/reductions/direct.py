"""Sums over ranks that send to each other directly, in the order of the ranks: ((x_0 + x_1) + x_2) + ...

A ring of n ranks passes everything on 2(n - 1) times, and each time costs the latency of a message. Here there are two
rounds of messages, with the traffic of a ring, or one round with n/2 times that for small arrays. The rounds overlap:
what has been summed is on its way while the rest is still being received, so that the links are never idle.
"""

from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import NamedTuple

import numpy as np

from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.node import add_up
from lentando.comm.reductions.reduction import quiet, store
from lentando.comm.transport import Array, Request, Transport

__all__ = ["IN_ONE_ROUND_BYTES", "DirectSums"]

TAG = 5
"""Tag that separates these messages from those of other operations."""
IN_ONE_ROUND_BYTES = 64 * 1024
"""Arrays that are not longer than this on all ranks together are sent whole, and summed by every rank."""
SEGMENT_BYTES = 64_000
"""Length of what is summed at once, and is then on its way while the next is received. A message over TCP has as
many bytes at most (``transports.mpi``)."""


class _Sending(NamedTuple):
    """The first messages of a sum.

    Attributes:
        is_whole: whether there are no others.
        segments: for each segment, an array of each rank.
        requests: for each segment, what is being sent.
    """

    is_whole: bool
    segments: list[list[Array]]
    requests: list[Request]


class DirectSums:
    """Sums over the ranks of one transport. Its scratch memory is kept from one sum to the next.

    Args:
        transport: transport that connects the ranks. All of them make the same calls in the same order.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        rank, size = transport.rank, transport.size
        # Each rank begins with the next one, so that all receive from the start.
        self._others = [(rank + distance) % size for distance in range(1, size)]
        self._scratch: Array = np.empty(0, np.uint8)
        self._ahead: _Sending | None = None

    def send_ahead(self, array: Array) -> None:
        """Send what ``all_reduce`` of this array, which comes next, would send first. Nothing is waited for."""
        self._ahead = self._send(array)

    def all_reduce(
        self,
        array: Array,
        *,
        mean: bool,
        first_barrier: Callable[[], object] | None = None,
        all_is_sent: Callable[[], object] | None = None,
    ) -> None:
        """Replace an array by its sum or mean over ranks, bit-identical on every rank.

        Args:
            array: one-dimensional contiguous array. Sums are formed in its dtype.
            mean: whether the sum is divided by the number of ranks.
            first_barrier: called when the first messages are on their way, if the ranks compare their calls meanwhile.
                Messages are received, and the array is changed, after it, if it does not raise an error.
            all_is_sent: called when only messages of other ranks are waited for.
        """
        rank, size = self._transport.rank, self._transport.size
        is_whole, segments, sending = self._ahead or self._send(array)
        self._ahead = None
        if first_barrier is not None:
            # Nothing is received before all ranks are known to send the same length: Open MPI 5 writes what is longer
            # than a receive beyond its end.
            first_barrier()
        terms = self._terms([parts[rank] for parts in segments])
        receiving = [self._exchange(received=rows) for rows in terms]
        gathering: list[Request] = []
        for parts, rows, sent, received in zip(segments, terms, sending, receiving, strict=True):
            received.wait()
            sent.wait()
            self._add_up(rows, parts[rank], size if mean else 1)
            if not is_whole:
                gathering.append(self._exchange([parts[rank]] * size, parts))
        if all_is_sent is not None:
            all_is_sent()
        for request in gathering:
            request.wait()

    def _send(self, array: Array) -> "_Sending":
        size = self._transport.size
        is_whole = array.nbytes * size <= IN_ONE_ROUND_BYTES
        segments = [[array] * size] if is_whole else _segments(array, size)
        return _Sending(is_whole, segments, [self._exchange(sent=parts) for parts in segments])

    def _exchange(self, sent: Sequence[Array] = (), received: Sequence[Array] = ()) -> Request:
        """Start to send the arrays to the other ranks, and to fill those received, by rank."""
        sends, receives = (
            [(rank, arrays[rank]) for rank in self._others if arrays and arrays[rank].size]
            for arrays in (sent, received)
        )
        return self._transport.exchange(sends, receives, TAG, overlap=False)

    def _terms(self, mine: Sequence[Array]) -> list[list[Array]]:
        """Memory for the terms of all ranks: for each segment, an array of each rank."""
        size = self._transport.size
        length = size * sum(part.nbytes for part in mine)
        if self._scratch.nbytes < length:
            self._scratch = np.empty(length, np.uint8)
        scratch = self._scratch[:length].view(mine[0].dtype)
        starts = accumulate((size * part.size for part in mine), initial=0)
        return [
            list(scratch[start : start + size * part.size].reshape(size, part.size))
            for start, part in zip(starts, mine, strict=False)
        ]

    def _add_up(self, terms: list[Array], mine: Array, divisor: int) -> None:
        terms[self._transport.rank] = mine
        with quiet():
            add_up(terms, terms[0])
        store(terms[0], mine, divisor)


def _segments(array: Array, size: int) -> list[list[Array]]:
    """The parts of an array that the ranks sum, cut alike: for each segment, an array of each rank."""
    parts = [array[ring_schedule.chunk(rank, size, array.size)] for rank in range(size)]
    length = max(1, SEGMENT_BYTES // array.itemsize)
    count = ring_schedule.segments(size, array.size, length)
    return [[part[number * length : (number + 1) * length] for part in parts] for number in range(count)]
