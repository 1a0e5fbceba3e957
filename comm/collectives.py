"""All-reduce in two halves, planned once for a buffer and executed many times.

The halves are apart because the outer step lives between them: ``reduce_scatter`` leaves each rank with the sum of its
shard, the rank replaces its shard by whatever it makes of that, and ``all_gather`` hands all shards out.
"""

from collections import deque
from math import inf
from typing import Literal, Protocol, TypeAlias

import numpy as np

from lentando.comm import ring
from lentando.comm.dtypes import accumulator_dtype, is_floating
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array, Request, Transport

__all__ = [
    "Algorithm",
    "EngineReduction",
    "NoReduction",
    "Reduction",
    "RingReduction",
    "all_reduce",
    "plan_reduction",
]

Algorithm: TypeAlias = Literal["auto", "ring", "engine"]

SEGMENT_BYTES = 1024 * 1024
"""Longest message of the ring."""
SEGMENTS_IN_FLIGHT = 4
"""Segments on their way while an earlier one is being added."""
RING_FROM_BYTES: dict[str, float] = {
    "one node": 32 * 1024 * 1024,
    "one node, in halves": 4 * 1024 * 1024,
    "several nodes": 256 * 1024,
    "horovod": inf,
}
"""``auto`` leaves smaller buffers to the engine: there, latency decides, and the ring needs 2(n - 1) steps. Between
nodes the ring wins early; in halves, the engine moves everything one and a half times.
``benchmarks/all_reduce.py`` shows where the lines cross. Over Horovod, messages are collectives too: no ring wins."""


class Reduction(Protocol):
    """A planned all-reduce of one buffer over all ranks.

    Attributes:
        shard: the range of the buffer that this rank owns between the two halves. The shards of all ranks
            partition the buffer.
    """

    shard: slice

    def reduce_scatter(self) -> Array:
        """The sum over ranks of this rank's shard, in float32 at least.

        The buffer itself is not touched. The result is scratch memory: valid until the next call.
        """

    def all_gather(self) -> None:
        """Overwrite every other rank's shard of the buffer with what that rank holds there."""

    def all_reduce(self, mean: bool) -> None:
        """Replace the buffer by its sum, or mean, over ranks."""


class RingReduction:
    """The segmented, pipelined ring of ``lentando.comm.ring``.

    While one segment is added, the next ones are on their way. float16 and bfloat16 travel as float32 partial sums in
    the first half, so that nothing is rounded before the sum is complete, and in their own dtype in the second.

    Args:
        transport: ranks that take part.
        buffer: one-dimensional and contiguous; read and written in place at every execution.
        segment_bytes: longest message.
    """

    def __init__(self, transport: Transport, buffer: Array, segment_bytes: int = SEGMENT_BYTES) -> None:
        self._transport = transport
        self._buffer = buffer
        rank, size, elements = transport.rank, transport.size, buffer.size
        self._accumulator = accumulator_dtype(buffer.dtype)
        self.shard = ring.shard(rank, size, elements)
        self._next, self._previous = (rank + 1) % size, (rank - 1) % size
        count = ring.segments(size, elements, segment_bytes // self._accumulator.itemsize)
        self._in_flight = min(count, SEGMENTS_IN_FLIGHT)
        # Partial sums alternate between two chunks of scratch: the one received at this step is sent at the next.
        longest = -(-elements // size)
        scratch = np.empty((2, longest), self._accumulator)
        starts = [ring.chunk(number, size, elements).start for number in range(size)]
        self._sum = scratch[size % 2, : self.shard.stop - self.shard.start]  # the slot that the last step fills

        def slot(step: int, owner: int, part: slice) -> Array:
            start = starts[owner % size]
            return scratch[step % 2, part.start - start : part.stop - start]

        self._reduce_plan = []
        for hop in ring.reduce_hops(rank, size, elements, count):
            own = buffer[hop.receive]
            received = slot(hop.step, rank - 1 - hop.step, hop.receive)
            sent = slot(hop.step - 1, rank - hop.step, hop.send) if hop.step else buffer[hop.send]
            self._reduce_plan.append((sent, received, own))
        self._gather_plan = [
            (buffer[hop.send], buffer[hop.receive]) for hop in ring.gather_hops(rank, size, elements, count)
        ]

    def reduce_scatter(self) -> Array:
        if self._transport.size == 1:
            np.copyto(self._sum, self._buffer)
            return self._sum
        pending: deque[tuple[Request, Array, Array]] = deque()
        for sent, received, own in self._reduce_plan:
            if len(pending) == self._in_flight:
                self._add(*pending.popleft())
            # In the first step the buffer's own values set out; widening them copies, which keeps the sum in float32.
            pending.append((self._pass_on(sent.astype(self._accumulator, copy=False), received), received, own))
        while pending:
            self._add(*pending.popleft())
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
        _store(self.reduce_scatter(), self._buffer[self.shard], self._transport.size if mean else 1)
        self.all_gather()

    def _pass_on(self, sent: Array, received: Array) -> Request:
        # An empty segment (fewer elements than ranks) is no message: both sides know its length.
        return self._transport.exchange(
            [(self._next, sent)] if sent.size else [],
            [(self._previous, received)] if received.size else [],
            overlap=False,
        )

    @staticmethod
    def _add(request: Request, received: Array, own: Array) -> None:
        request.wait()
        with _quiet():
            np.add(received, own, out=received)


class EngineReduction:
    """The engine's own all-reduce: least latency for small buffers, at the price of a full-size scratch copy."""

    def __init__(self, transport: Transport, buffer: Array) -> None:
        self._transport = transport
        self._buffer = buffer
        size = transport.size
        self.shard = ring.shard(transport.rank, size, buffer.size)
        self._shards = [ring.shard(rank, size, buffer.size) for rank in range(size)]
        self._scratch = np.empty(buffer.size, accumulator_dtype(buffer.dtype))
        self._padded = np.zeros(-(-buffer.size // size), buffer.dtype)  # all-gather takes equal shapes

    def reduce_scatter(self) -> Array:
        self._reduce()
        return self._scratch[self.shard]

    def all_gather(self) -> None:
        self._padded[: self.shard.stop - self.shard.start] = self._buffer[self.shard]
        gathered = self._transport.allgather(self._padded)
        for rank, part in enumerate(self._shards):
            self._buffer[part] = gathered[rank, : part.stop - part.start]

    def all_reduce(self, mean: bool) -> None:
        total = self._buffer
        if self._scratch.dtype == total.dtype:
            self._transport.allreduce(total)  # two copies less
        else:
            self._reduce()
            total = self._scratch
        _store(total, self._buffer, self._transport.size if mean else 1)

    def _reduce(self) -> None:
        np.copyto(self._scratch, self._buffer)
        self._transport.allreduce(self._scratch)


class NoReduction:
    """The same two halves without the others: this rank alone owns all of the buffer, and nothing is sent."""

    def __init__(self, buffer: Array) -> None:
        self._buffer = buffer
        self.shard = slice(0, buffer.size)
        self._scratch = np.empty(buffer.size, accumulator_dtype(buffer.dtype))

    def reduce_scatter(self) -> Array:
        np.copyto(self._scratch, self._buffer)
        return self._scratch

    def all_gather(self) -> None:
        return

    def all_reduce(self, mean: bool) -> None:
        return


def _quiet() -> np.errstate:
    """Infinities and NaNs are the caller's to find in the result: a warning in the middle of a sum helps nobody."""
    return np.errstate(over="ignore", invalid="ignore")


def _store(total: Array, out: Array, divisor: int) -> None:
    """``out = total / divisor``, rounded to ``out``'s dtype once."""
    if divisor != 1:
        np.true_divide(total, divisor, out=total)
    if total is not out:
        with _quiet():
            np.copyto(out, total, casting="same_kind")


def plan_reduction(
    transport: Transport, buffer: Array, algorithm: Algorithm = "auto", *, in_halves: bool = False
) -> Reduction:
    """Plan the all-reduce of ``buffer``, one-dimensional and contiguous, by the algorithm that suits its size.

    Args:
        transport: ranks that take part; all must plan the same number of elements, dtype and algorithm.
        buffer: float32, float64, float16, bfloat16 or integers; kept, and used in place at each execution.
        algorithm: ``"ring"``, ``"engine"`` (the transport's own all-reduce), or ``"auto"``.
        in_halves: it will be used by its halves, not as a whole: ``"auto"`` then chooses otherwise.

    Raises:
        ConfigurationError: for any other algorithm, dtype or shape.
    """
    if buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise ConfigurationError(f"a reduction needs a contiguous one-dimensional array, got shape {buffer.shape}")
    if algorithm == "auto":
        place = "several nodes"
        if transport.local_size == transport.size:
            place = "one node, in halves" if in_halves else "one node"
        place = transport.name if transport.name in RING_FROM_BYTES else place
        algorithm = "ring" if transport.size == 1 or buffer.nbytes >= RING_FROM_BYTES[place] else "engine"
    if algorithm == "ring":
        return RingReduction(transport, buffer)
    if algorithm == "engine":
        return EngineReduction(transport, buffer)
    raise ConfigurationError(f"algorithm must be 'auto', 'ring' or 'engine', got {algorithm!r}")


def all_reduce(transport: Transport, array: Array, *, mean: bool = False, algorithm: Algorithm = "auto") -> None:
    """Replace ``array`` (any shape, C-contiguous) by its sum or mean over ranks, equal to the bit on every rank.

    Raises:
        ConfigurationError: for the mean of integers, or what ``plan_reduction`` refuses.
    """
    if mean and not is_floating(array.dtype):
        raise ConfigurationError(
            f"the mean of {array.dtype} is not of that dtype: use a sum, or convert to floating point"
        )
    if not array.flags.c_contiguous:
        raise ConfigurationError("all_reduce works in place and needs a C-contiguous array")
    plan_reduction(transport, array.reshape(-1), algorithm).all_reduce(mean)
