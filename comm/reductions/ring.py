"""All-reduce round a ring: the least traffic that there can be."""

from collections import deque

import numpy as np

from lentando.comm import ring
from lentando.comm.array_module import array_module
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.reductions.reduction import Each, quiet, store, visit
from lentando.comm.transport import Array, Exchanges, Request

__all__ = ["RingReduction"]

SEGMENT_BYTES = 1024 * 1024
"""Longest message of the ring."""
SEGMENTS_IN_FLIGHT = 4
"""Segments on their way while an earlier one is being added."""


class RingReduction:
    """The segmented, pipelined ring of ``lentando.comm.ring``.

    While one segment is added, the next ones are on their way. float16 and bfloat16 travel as float32 partial sums in
    the first half, so that nothing is rounded before the sum is complete, and in their own dtype in the second.

    Args:
        transport: ranks that take part.
        buffer: one-dimensional and contiguous; read and written in place at every execution.
        segment_bytes: longest message.
        terms: what is summed, of the buffer's length, where that is not what the buffer holds.
    """

    def __init__(
        self, transport: Exchanges, buffer: Array, segment_bytes: int = SEGMENT_BYTES, terms: Array | None = None
    ) -> None:
        self._transport = transport
        self._buffer = buffer
        self._terms = buffer if terms is None else terms
        rank, size, elements = transport.rank, transport.size, buffer.size
        self._accumulator = accumulator_dtype(buffer.dtype)
        self._module = array_module(buffer)
        self.shard = ring.shard(rank, size, elements)
        self._next, self._previous = (rank + 1) % size, (rank - 1) % size
        count = ring.segments(size, elements, segment_bytes // self._accumulator.itemsize)
        self._in_flight = min(count, SEGMENTS_IN_FLIGHT)
        # Partial sums alternate between two chunks of scratch: the one received at this step is sent at the next.
        longest = -(-elements // size)
        scratch: Array = self._module.empty((2, longest), self._accumulator)
        starts = [ring.chunk(number, size, elements).start for number in range(size)]
        self._sum = scratch[size % 2, : self.shard.stop - self.shard.start]  # the slot that the last step fills

        def slot(step: int, owner: int, part: slice) -> Array:
            start = starts[owner % size]
            return scratch[step % 2, part.start - start : part.stop - start]

        self._reduce_plan = []
        for hop in ring.reduce_hops(rank, size, elements, count):
            own = self._terms[hop.receive]
            received = slot(hop.step, rank - 1 - hop.step, hop.receive)
            sent = slot(hop.step - 1, rank - hop.step, hop.send) if hop.step else self._terms[hop.send]
            self._reduce_plan.append((sent, received, own, hop.step == size - 2))
        self._gather_plan = [
            (buffer[hop.send], buffer[hop.receive]) for hop in ring.gather_hops(rank, size, elements, count)
        ]

    def reduce_scatter(self, each: Each | None = None) -> Array:
        if self._transport.size == 1:
            self._module.copyto(self._sum, self._terms)
            visit(self._sum, each)
            return self._sum
        pending: deque[tuple[Request, Array, Array, bool]] = deque()

        def add() -> None:
            request, received, own, is_complete = pending.popleft()
            request.wait()
            with quiet():
                np.add(received, own, out=received)
            if is_complete:
                visit(received, each)

        for sent, received, own, is_complete in self._reduce_plan:
            if len(pending) == self._in_flight:
                add()
            # In the first step the buffer's own values set out; widening them copies, which keeps the sum in float32.
            request = self._pass_on(sent.astype(self._accumulator, copy=False), received)
            pending.append((request, received, own, is_complete))
        while pending:
            add()
        return self._sum

    def all_gather(self) -> None:
        pending: deque[Request] = deque()
        for sent, received in self._gather_plan:
            if len(pending) == self._in_flight:
                pending.popleft().wait()
            pending.append(self._pass_on(sent, received))
        while pending:
            pending.popleft().wait()

    def all_reduce(self, mean: bool) -> None:
        store(self.reduce_scatter(), self._buffer[self.shard], self._transport.size if mean else 1)
        self.all_gather()

    def _pass_on(self, sent: Array, received: Array) -> Request:
        # An empty segment (fewer elements than ranks) is no message: both sides know its length.
        return self._transport.exchange(
            [(self._next, sent)] if sent.size else [],
            [(self._previous, received)] if received.size else [],
            overlap=False,
        )
