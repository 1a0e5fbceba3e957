"""All-reduce on a ring of ranks, with the least traffic that any all-reduce can have."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from typing import NamedTuple, TypeAlias

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.reduction import Each, quiet, store, visit
from lentando.comm.transport import Array, Exchanges, Request

__all__ = ["DEFAULT_SEGMENTS", "RingReduction", "Segments"]


class Segments(NamedTuple):
    """How a ring cuts its messages. No choice changes a bit of the sum.

    Attributes:
        segment_bytes: length limit of a message. By default short enough that the link is busy while others are added.
        in_flight: number of segments that may be in flight while an earlier one is being added.
    """

    segment_bytes: int = 256 * 1024
    in_flight: int = 4


DEFAULT_SEGMENTS = Segments()

Finish: TypeAlias = Callable[[Array, Array], object]
"""Called with each segment of the sum once it is complete, and with the range of the buffer that it belongs to."""


class _Transfer(NamedTuple):
    """One hop of the schedule, on arrays.

    Attributes:
        sent, received: the arrays to send and to fill.
        then: called once both transfers are complete.
    """

    sent: Array
    received: Array
    then: Callable[[], object] | None = None


class _ReduceHop(NamedTuple):
    """One hop of the reduce-scatter, on arrays.

    Attributes:
        sent, received: the partial sums to send and to receive.
        terms: this rank's values, which are added to those received.
        target: range of the buffer where the sum is complete after this hop; None if it is not.
    """

    sent: Array
    received: Array
    terms: Array
    target: Array | None


class RingReduction:
    """The segmented, pipelined ring whose schedule is ``lentando.comm.reductions.ring_schedule``.

    While one segment is added, the next ones are in flight. float16 and bfloat16 are sent as float32 partial sums in
    the reduce-scatter, so that nothing is rounded before the sum is complete, and in their own dtype in the all-gather.

    Args:
        transport: transport that connects the participating ranks.
        buffer: one-dimensional, contiguous array; read and written in place at every execution.
        segments: how messages are cut.
        terms: values to be summed instead of those of the buffer, as an array of the buffer's length.
    """

    def __init__(
        self,
        transport: Exchanges,
        buffer: Array,
        segments: Segments = DEFAULT_SEGMENTS,
        terms: Array | None = None,
    ) -> None:
        self._transport = transport
        self._buffer = buffer
        self._terms = buffer if terms is None else terms
        rank, size, elements = transport.rank, transport.size, buffer.size
        self._accumulator = accumulator_dtype(buffer.dtype)
        self._module = array_module(buffer)
        self.shard = ring_schedule.shard(rank, size, elements)
        self._next, self._previous = (rank + 1) % size, (rank - 1) % size
        count = ring_schedule.segments(size, elements, segments.segment_bytes // self._accumulator.itemsize)
        self._in_flight = min(count, segments.in_flight)
        # Partial sums alternate between two chunks of scratch: the one received at this step is sent at the next.
        longest = -(-elements // size)
        scratch: Array = self._module.empty((2, longest), self._accumulator)
        starts = [ring_schedule.chunk(number, size, elements).start for number in range(size)]
        self._sum = scratch[size % 2, : self.shard.stop - self.shard.start]  # filled by the last step

        def slot(step: int, owner: int, part: slice) -> Array:
            start = starts[owner % size]
            return scratch[step % 2, part.start - start : part.stop - start]

        self._reduce_plan: list[_ReduceHop] = []
        for hop in ring_schedule.reduce_hops(rank, size, elements, count):
            received = slot(hop.step, rank - 1 - hop.step, hop.receive)
            sent = slot(hop.step - 1, rank - hop.step, hop.send) if hop.step else self._terms[hop.send]
            target = buffer[hop.receive] if hop.step == size - 2 else None
            self._reduce_plan.append(_ReduceHop(sent, received, self._terms[hop.receive], target))
        self._gather_plan = [
            _Transfer(buffer[hop.send], buffer[hop.receive])
            for hop in ring_schedule.gather_hops(rank, size, elements, count)
        ]

    def reduce_scatter(self, each: Each | None = None) -> Array:
        if self._transport.size == 1:
            self._module.copyto(self._sum, self._terms)
            visit(self._sum, each)
        self._run(self._reduce_transfers(lambda total, _: visit(total, each)))
        return self._sum

    def all_gather(self) -> None:
        self._run(self._gather_plan)

    def all_reduce(self, mean: bool) -> None:
        self.reduce_and_divide(self._transport.size if mean else 1)

    def reduce_and_divide(self, divisor: int) -> None:
        """All-reduce, and divide. The first complete segments are sent while the last ones are still being summed."""
        if self._transport.size == 1:
            store(self.reduce_scatter(), self._buffer, divisor)
            return

        def finish(total: Array, target: Array) -> None:
            store(total, target, divisor)

        self._run(chain(self._reduce_transfers(finish), self._gather_plan))

    def _reduce_transfers(self, finish: Finish) -> Iterator[_Transfer]:
        def add(hop: _ReduceHop) -> None:
            with quiet():
                np.add(hop.received, hop.terms, out=hop.received)
            if hop.target is not None:
                finish(hop.received, hop.target)

        for hop in self._reduce_plan:
            # The first step sends the buffer's own values. Widening copies them, which keeps the sum in float32.
            sent = hop.sent.astype(self._accumulator, copy=False)
            yield _Transfer(sent, hop.received, partial(add, hop))

    def _run(self, transfers: Iterable[_Transfer]) -> None:
        """Execute transfers in order, a limited number at a time.

        No more than the segments of one chunk are in flight: a hop sends what the hop of the step before has received
        and added.
        """
        pending: deque[tuple[Request, Callable[[], object] | None]] = deque()
        for transfer in transfers:
            if len(pending) == self._in_flight:
                _complete(*pending.popleft())
            pending.append((self._start(transfer), transfer.then))
        while pending:
            _complete(*pending.popleft())

    def _start(self, transfer: _Transfer) -> Request:
        # An empty segment (fewer elements than ranks) is not sent: both sides know its length.
        return self._transport.exchange(
            [(self._next, transfer.sent)] if transfer.sent.size else [],
            [(self._previous, transfer.received)] if transfer.received.size else [],
            overlap=False,
        )


def _complete(request: Request, then: Callable[[], object] | None) -> None:
    request.wait()
    if then is not None:
        then()
