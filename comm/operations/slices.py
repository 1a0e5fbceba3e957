"""Slices of arrays that each rank sends to each other rank."""

from collections.abc import Sequence
from itertools import accumulate, pairwise

import numpy as np

from lentando.comm.transport import Array, Transport

__all__ = ["exchange_into", "exchange_slices", "share_slices", "slice_bounds", "slice_lengths"]

SLICES_TAG = 2
"""Tag that separates slices from the messages of ring reductions (0) and of gossip (1)."""


def slice_lengths(length: int, count: int) -> list[int]:
    """Divide a length among ranks. The first ranks get one more if it cannot be divided equally, as in Horovod.

    Example:
        >>> slice_lengths(7, 3)
        [3, 2, 2]
    """
    return [length // count + (rank < length % count) for rank in range(count)]


def slice_bounds(length: int, count: int) -> list[int]:
    """The start of each rank's slice, and the end of the last one.

    Example:
        >>> slice_bounds(7, 3)
        [0, 3, 5, 7]
    """
    return [0, *accumulate(slice_lengths(length, count))]


def exchange_slices(transport: Transport, sends: Sequence[Array], lengths: Sequence[int] | None = None) -> list[Array]:
    """Send one array to each rank, and return what each rank has sent to this one. Collective.

    Args:
        transport: transport of the participating ranks.
        sends: contiguous arrays of one dtype, one for each rank; they may be empty.
        lengths: first dimensions of the arrays that will be received from each rank; by default all are equal to that
            of this rank's array for itself.

    Returns:
        arrays by rank, in new memory, with the same other axes as those sent.
    """
    own = sends[transport.rank]
    received = [
        np.empty((own.shape[0] if lengths is None else lengths[rank], *own.shape[1:]), own.dtype)
        for rank in range(transport.size)
    ]
    exchange_into(transport, sends, received)
    return received


def exchange_into(transport: Transport, sends: Sequence[Array], received: Sequence[Array]) -> None:
    """Send one array to each rank, and fill another one with what each rank has sent to this one. Collective.

    Args:
        transport: transport of the participating ranks.
        sends: contiguous arrays of one dtype, one for each rank; they may be empty.
        received: contiguous arrays to be filled, of the lengths that each rank sends.
    """
    own = transport.rank
    received[own][...] = sends[own]
    others = [rank for rank in range(transport.size) if rank != own]
    transport.exchange(
        [(rank, sends[rank]) for rank in others if sends[rank].size],
        [(rank, received[rank]) for rank in others if received[rank].size],
        SLICES_TAG,
        overlap=False,
    ).wait()


def share_slices(transport: Transport, array: Array, bounds: Sequence[int]) -> None:
    """Send this rank's slice of an array to all ranks, and fill the other slices with theirs. Collective.

    Args:
        transport: transport of the participating ranks.
        array: one-dimensional contiguous array.
        bounds: bounds of the slices, as ``slice_bounds`` returns them.
    """
    slices = [array[start:end] for start, end in pairwise(bounds)]
    own = slices[transport.rank]
    others = [rank for rank in range(transport.size) if rank != transport.rank]
    transport.exchange(
        [(rank, own) for rank in others if own.size],
        [(rank, slices[rank]) for rank in others if slices[rank].size],
        SLICES_TAG,
        overlap=False,
    ).wait()
