"""All-reduce round a ring: the least traffic that there can be."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import TypeAlias

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.reduction import Each, quiet, store, visit
from lentando.comm.transport import Array, Exchanges, Request

__all__ = ["RingReduction"]

SEGMENT_BYTES = 256 * 1024
"""Longest message of the ring: short enough that a link has always one to carry while others are being added."""
SEGMENTS_IN_FLIGHT = 4
"""Segments on their way while an earlier one is being added."""

_Hop: TypeAlias = tuple[Array, Array, Callable[[], object] | None]
"""What is sent, what is filled, and what is done when both have happened."""
Finish: TypeAlias = Callable[[Array, Array], object]
"""What is done with each segment of the sum, and the place of that segment in the buffer, as soon as it is complete."""


class RingReduction:
    """The segmented, pipelined ring of ``lentando.comm.reductions.ring_schedule``.

    While one segment is added, the next ones are on their way. float16 and bfloat16 travel as float32 partial sums in
    the first half, so that nothing is rounded before the sum is complete, and in their own dtype in the second.

    Args:
        transport: ranks that take part.
        buffer: one-dimensional and contiguous; read and written in place at every execution.
        segment_bytes: longest message. It changes no bits of the sum, nor does ``in_flight``.
        terms: what is summed, of the buffer's length, where that is not what the buffer holds.
        in_flight: most segments that are on their way while an earlier one is being added.
    """

    def __init__(
        self,
        transport: Exchanges,
        buffer: Array,
        segment_bytes: int = SEGMENT_BYTES,
        terms: Array | None = None,
        *,
        in_flight: int = SEGMENTS_IN_FLIGHT,
    ) -> None:
        self._transport = transport
        self._buffer = buffer
        self._terms = buffer if terms is None else terms
        rank, size, elements = transport.rank, transport.size, buffer.size
        self._accumulator = accumulator_dtype(buffer.dtype)
        self._module = array_module(buffer)
        self.shard = ring_schedule.shard(rank, size, elements)
        self._next, self._previous = (rank + 1) % size, (rank - 1) % size
        count = ring_schedule.segments(size, elements, segment_bytes // self._accumulator.itemsize)
        self._in_flight = min(count, in_flight)
        # Partial sums alternate between two chunks of scratch: the one received at this step is sent at the next.
        longest = -(-elements // size)
        scratch: Array = self._module.empty((2, longest), self._accumulator)
        starts = [ring_schedule.chunk(number, size, elements).start for number in range(size)]
        self._sum = scratch[size % 2, : self.shard.stop - self.shard.start]  # the slot that the last step fills

        def slot(step: int, owner: int, part: slice) -> Array:
            start = starts[owner % size]
            return scratch[step % 2, part.start - start : part.stop - start]

        self._reduce_plan = []
        for hop in ring_schedule.reduce_hops(rank, size, elements, count):
            own = self._terms[hop.receive]
            received = slot(hop.step, rank - 1 - hop.step, hop.receive)
            sent = slot(hop.step - 1, rank - hop.step, hop.send) if hop.step else self._terms[hop.send]
            place = buffer[hop.receive] if hop.step == size - 2 else None  # where the sum is complete
            self._reduce_plan.append((sent, received, own, place))
        self._gather_plan = [
            (buffer[hop.send], buffer[hop.receive]) for hop in ring_schedule.gather_hops(rank, size, elements, count)
        ]

    def reduce_scatter(self, each: Each | None = None) -> Array:
        if self._transport.size == 1:
            self._module.copyto(self._sum, self._terms)
            visit(self._sum, each)
        self._travel(self._reduce_hops(lambda total, _: visit(total, each)))
        return self._sum

    def all_gather(self) -> None:
        self._travel(self._gather_hops())

    def all_reduce(self, mean: bool) -> None:
        self.reduce_and_divide(self._transport.size if mean else 1)

    def reduce_and_divide(self, divisor: int) -> None:
        """All-reduce, and divide: the first finished segments set out while the last ones are still being summed."""
        if self._transport.size == 1:
            store(self.reduce_scatter(), self._buffer, divisor)
            return

        def finish(total: Array, place: Array) -> None:
            store(total, place, divisor)

        self._travel(chain(self._reduce_hops(finish), self._gather_hops()))

    def _reduce_hops(self, finish: Finish | None = None) -> Iterator[_Hop]:
        def add(received: Array, own: Array, place: Array | None) -> None:
            with quiet():
                np.add(received, own, out=received)
            if finish is not None and place is not None:
                finish(received, place)

        for sent, received, own, place in self._reduce_plan:
            # In the first step the buffer's own values set out; widening them copies, which keeps the sum in float32.
            yield sent.astype(self._accumulator, copy=False), received, partial(add, received, own, place)

    def _gather_hops(self) -> Iterator[_Hop]:
        return ((sent, received, None) for sent, received in self._gather_plan)

    def _travel(self, hops: Iterable[_Hop]) -> None:
        """Let segments travel, in order, so many at a time.

        At most a chunk's segments are under way: what a hop sends, the hop of the step before has received and added.
        """
        pending: deque[tuple[Request, Callable[[], object] | None]] = deque()
        for sent, received, then in hops:
            if len(pending) == self._in_flight:
                _complete(*pending.popleft())
            pending.append((self._pass_on(sent, received), then))
        while pending:
            _complete(*pending.popleft())

    def _pass_on(self, sent: Array, received: Array) -> Request:
        # An empty segment (fewer elements than ranks) is no message: both sides know its length.
        return self._transport.exchange(
            [(self._next, sent)] if sent.size else [],
            [(self._previous, received)] if received.size else [],
            overlap=False,
        )


def _complete(request: Request, then: Callable[[], object] | None) -> None:
    request.wait()
    if then is not None:
        then()
