"""Reduce-scatter and all-gather of one buffer in coded messages, for values that are sent in fewer bits.

A ring would code the partial sum at each of its n - 1 hops, and add a rounding error each time. Here every rank sends
each other rank the part that belongs to it, coded once; the rank decodes the parts of all ranks and adds them in the
order of the ranks, in float32 at least. The all-gather sends each rank's result to all others, coded once more. Each
half sends (n - 1) / n of the coded buffer per rank, as the halves of a ring do, and 2 (n - 1) messages in all. As all
ranks decode the same bytes, they get the same bits, over every transport and in a simulation.

The elements from some place on can be left uncoded: statistics, for example, among which one block may hold variances
of very unequal size, and counts of gradients.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import numpy as np

from lentando.comm.array_module import array_module, is_on_host
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import all_finite, blocks
from lentando.comm.operations.slices import slice_bounds
from lentando.comm.reductions.reduction import quiet
from lentando.comm.transport import Array, Message, Transport
from lentando.optimizers.rules.block_scaling import BLOCK_ELEMENTS
from lentando.optimizers.rules.wire import SentShare, Wire, wire_of

__all__ = ["CODED_TAG", "PAIRWISE_FROM_BYTES", "CodedExchange", "Piece"]

CODED_TAG = 3
"""Tag that separates these messages from those of rings (0), of gossip (1) and of slices (2)."""


PAIRWISE_FROM_BYTES = 64 * 1024
"""Longer messages to different ranks would compete for the links; for shorter ones, latency counts."""


@dataclass(frozen=True)
class Piece:
    """Consecutive elements that fit the cache, and their place in a message.

    Attributes:
        elements: range of the buffer.
        in_shard: the same elements, counted from the start of their shard.
        is_coded: whether they are coded by the wire; otherwise they are sent as they are.
        share: part of the message that holds them.
        in_share: the same elements, counted from the start of that part.
    """

    elements: slice
    in_shard: slice
    is_coded: bool
    share: SentShare
    in_share: slice

    def write(self, values: Array) -> Array:
        """Put values into the message, and return what receivers read."""
        return self.share.write(self.in_share, values, 1.0)

    def write_with_error(self, values: Array, error: Array) -> None:
        """Put values into the message, with what was left out earlier, and keep what is left out now.

        Nothing is left out of a piece that is not coded.

        Args:
            values: values of this piece; changed.
            error: what earlier messages have left out of these elements. What is not finite is forgotten: the caller
                will not use the result, and it must not return with the next message.
        """
        if not self.is_coded:
            self.write(values)
            return
        with quiet():
            np.add(values, error, out=values)
            np.subtract(values, self.write(values), out=error)
        if not all_finite(error):
            error[~np.isfinite(error)] = 0

    def read(self) -> Array:
        """Values that the message holds."""
        return self.share.read(self.in_share)


Read: TypeAlias = Callable[[Piece], Array]
"""Returns this rank's values of a piece, in the accumulator dtype of the buffer. They are used before the next call."""


class CodedExchange:
    """The messages of one buffer, planned once, with their memory: twice the coded buffer.

    Args:
        transport: transport that connects the ranks.
        buffer: one-dimensional array. Only its size, dtype and place are used.
        coded: number of elements, from the start, that the wire codes; the others are sent as they are.
        wire: coding of the messages. In a job of one rank nothing is coded.

    Attributes:
        shard: range of the buffer whose sum this rank forms. It begins at a multiple of the wire's blocks.
        is_exact: whether nothing is rounded.
    """

    def __init__(self, transport: Transport, buffer: Array, coded: int, wire: Wire) -> None:
        if not is_on_host(buffer):
            raise ConfigurationError(
                "wire_dtype, weighting and movement_penalty of outer steps need the parameters in host memory: leave "
                "them out"
            )
        self._transport = transport
        size, rank = transport.size, transport.rank
        wire = wire if size > 1 else wire_of(None)
        self.is_exact = wire.is_exact
        bounds = [
            min(bound * BLOCK_ELEMENTS, buffer.size) for bound in slice_bounds(-(-buffer.size // BLOCK_ELEMENTS), size)
        ]
        shards = [slice(start, stop) for start, stop in pairwise(bounds)]
        self.shard = shards[rank]
        like: Array = array_module(buffer).empty(0, accumulator_dtype(buffer.dtype))
        self._total: Array = array_module(buffer).empty(self.shard.stop - self.shard.start, like.dtype)
        self._parts = [_Message(shard, coded, like, wire) for shard in shards]  # this rank's values, then all results
        self._terms = [
            self._parts[rank] if other == rank else _Message(self.shard, coded, like, wire) for other in range(size)
        ]
        longest = max((piece.elements.stop - piece.elements.start for piece in self.pieces()), default=0)
        self._scratch: Array = array_module(buffer).empty(longest, like.dtype)
        # Each rank begins with the next one, so that no two ranks send to the same one at once.
        self._receivers = [(rank + distance) % size for distance in range(1, size)]
        self._senders = [(rank - distance) % size for distance in range(1, size)]

    def pieces(self, *, own: bool | None = None) -> Iterator[Piece]:
        """The pieces of the whole buffer.

        Args:
            own: True for those of this rank's shard alone, False for those of the others.
        """
        for number, part in enumerate(self._parts):
            if own is None or own is (number == self._transport.rank):
                yield from part.pieces

    def scratch(self, piece: Piece) -> Array:
        """Memory for the values of a piece, the same for all pieces."""
        return self._scratch[: piece.elements.stop - piece.elements.start]

    def reduce(self, each: Callable[[Piece, Array], object]) -> Array:
        """Send the pieces, which the caller has written, and return the sum of this rank's shard over all ranks.

        Args:
            each: function that is called with each piece of the shard and its sum, which it may change.

        Returns:
            the sum, in memory that is valid until the next call.
        """
        self._exchange(
            [(other, self._parts[other].memory) for other in self._receivers],
            [(other, self._terms[other].memory) for other in self._senders],
        )
        for number, piece in enumerate(self._parts[self._transport.rank].pieces):
            total = self._total[piece.in_shard]
            with quiet():
                for rank, term in enumerate(self._terms):
                    values = term.pieces[number].read()
                    if rank:
                        np.add(total, values, out=total)
                    else:
                        array_module(total).copyto(total, values)
            each(piece, total)
        return self._total

    def gather(self) -> None:
        """Send this rank's own pieces, which the caller has written, to all, and receive those of all others."""
        own = self._parts[self._transport.rank].memory
        self._exchange(
            [(other, own) for other in self._receivers],
            [(other, self._parts[other].memory) for other in self._senders],
        )

    def _exchange(self, sends: list[Message], receives: list[Message]) -> None:
        """Exchange messages: long ones with one pair of ranks after the other, short ones with all at once.

        Empty messages (fewer blocks than ranks) are not sent: both sides know their lengths.
        """
        at_once = 1 if self._parts[0].memory.size >= PAIRWISE_FROM_BYTES else len(sends)
        for start in range(0, len(sends), max(at_once, 1)):
            part = slice(start, start + at_once)
            self._transport.exchange(
                [message for message in sends[part] if message[1].size],
                [message for message in receives[part] if message[1].size],
                CODED_TAG,
                overlap=False,
            ).wait()


class _Message:
    """A shard of the buffer in one message: the elements that are sent as they are, then those that are coded.

    Args:
        shard: range of the buffer.
        coded: number of elements of the buffer that are coded.
        like: array of the buffer's kind, in its accumulator dtype.
        wire: coding.
    """

    def __init__(self, shard: slice, coded: int, like: Array, wire: Wire) -> None:
        border = min(max(coded, shard.start), shard.stop)
        parts: list[tuple[slice, bool, Any]] = [
            (slice(border, shard.stop), False, wire_of(None)),
            (slice(shard.start, border), True, wire),
        ]
        arrays = [_of_size(like, part.stop - part.start) for part, _, _ in parts]
        lengths = [coding.size_bytes(array) for (_, _, coding), array in zip(parts, arrays, strict=True)]
        self.memory: Array = array_module(like).zeros(sum(lengths), np.uint8)
        self.pieces: list[Piece] = []
        for (part, is_coded, coding), array, start, length in zip(parts, arrays, (0, lengths[0]), lengths, strict=True):
            if not array.size:
                continue
            share = coding.share_in(self.memory[start : start + length], array)
            for block in blocks(array):
                within = slice(block.start, min(block.stop, array.size))
                elements = slice(part.start + within.start, part.start + within.stop)
                in_shard = slice(elements.start - shard.start, elements.stop - shard.start)
                self.pieces.append(Piece(elements, in_shard, is_coded, share, within))


def _of_size(like: Array, size: int) -> Array:
    """An array of this size in memory of one element."""
    one: Array = array_module(like).empty(1, like.dtype)
    return array_module(like).broadcast_to(one, (size,))  # type: ignore[no-any-return]
