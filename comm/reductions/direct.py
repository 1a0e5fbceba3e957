"""Sums over ranks that send to each other directly, in the order of the ranks: ((x_0 + x_1) + x_2) + ...

A ring of n ranks passes everything on 2(n - 1) times, and each time costs the latency of a message. Here there are two
rounds of messages, with the traffic of a ring, or one round with n/2 times that for small arrays.
"""

from collections.abc import Callable

import numpy as np

from lentando.comm.flat import blocks
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.reduction import quiet, store
from lentando.comm.transport import Array, Transport

__all__ = ["IN_ONE_ROUND_BYTES", "DirectSums"]

TAG = 5
"""Tag that separates these messages from those of other operations."""
IN_ONE_ROUND_BYTES = 64 * 1024
"""Arrays that are not longer than this on all ranks together are sent whole, and summed by every rank."""


class DirectSums:
    """Sums over the ranks of one transport. Its scratch memory is kept from one sum to the next.

    Args:
        transport: transport that connects the ranks. All of them make the same calls in the same order.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._others = [rank for rank in range(transport.size) if rank != transport.rank]
        self._scratch: Array = np.empty(0, np.uint8)

    def all_reduce(self, array: Array, *, mean: bool, first_barrier: Callable[[], object] | None = None) -> None:
        """Replace an array by its sum or mean over ranks, bit-identical on every rank.

        Args:
            array: one-dimensional contiguous array. Sums are formed in its dtype.
            mean: whether the sum is divided by the number of ranks.
            first_barrier: called when the first messages are on their way, if the ranks compare their calls meanwhile.
                Messages are received, and the array is changed, after it, if it does not raise an error.
        """
        transport, size = self._transport, self._transport.size
        is_whole = array.nbytes * size <= IN_ONE_ROUND_BYTES
        whole = slice(0, array.size)
        parts = [whole if is_whole else ring_schedule.chunk(rank, size, array.size) for rank in range(size)]
        mine = array[parts[transport.rank]]
        received = self._received(mine)
        sends = [(rank, array[parts[rank]]) for rank in self._others if array[parts[rank]].size]
        receives = [(rank, received[rank]) for rank in self._others if mine.size]
        if first_barrier is None:
            transport.exchange(sends, receives, TAG, overlap=False).wait()
        else:
            # Nothing is received before all ranks are known to send the same length: Open MPI 5 writes what is longer
            # than a receive beyond its end.
            sending = transport.exchange(sends, [], TAG, overlap=False)
            first_barrier()
            transport.exchange([], receives, TAG, overlap=False).wait()
            sending.wait()
        received[transport.rank] = mine
        self._add_up(received, mine, size if mean else 1)
        if not is_whole:
            transport.exchange(
                [(rank, mine) for rank in self._others if mine.size],
                [(rank, array[parts[rank]]) for rank in self._others if array[parts[rank]].size],
                TAG,
                overlap=False,
            ).wait()

    def _received(self, mine: Array) -> Array:
        """Memory for the terms of all ranks."""
        length = self._transport.size * mine.nbytes
        if self._scratch.nbytes < length:
            self._scratch = np.empty(length, np.uint8)
        return self._scratch[:length].view(mine.dtype).reshape(self._transport.size, mine.size)

    def _add_up(self, received: Array, total: Array, divisor: int) -> None:
        with quiet():
            for block in blocks(total):
                terms = received[0, block]
                for rank in range(1, self._transport.size):
                    np.add(terms, received[rank, block], out=terms)
                np.copyto(total[block], terms)
        store(total, total, divisor)
