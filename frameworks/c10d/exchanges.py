"""Collective operations in which ranks exchange flat arrays without combining them."""

from collections.abc import Sequence

import numpy as np
from torch.distributed import DistBackendError

from lentando.comm.operations.slices import exchange_into
from lentando.comm.transport import Array, Transport

__all__ = ["exchange_compared", "gather_into", "scatter_from"]

TAG = 3
"""Tag that separates these messages from those of rings (0) and slices (2)."""


def gather_into(transport: Transport, array: Array, outputs: Sequence[Array] | None, root: int) -> None:
    """Collect the arrays of all ranks at the root. Collective.

    Args:
        transport: transport of the participating ranks.
        array: this rank's array.
        outputs: at the root, an array to be filled for each rank; None elsewhere.
        root: rank that receives them.
    """
    if outputs is None:
        transport.exchange(_filled([(root, array)]), [], TAG, overlap=False).wait()
        return
    outputs[root][...] = array
    others = [(rank, output) for rank, output in enumerate(outputs) if rank != root]
    transport.exchange([], _filled(others), TAG, overlap=False).wait()


def scatter_from(transport: Transport, inputs: Sequence[Array] | None, output: Array, root: int) -> None:
    """Distribute the arrays of the root. Collective.

    Args:
        transport: transport of the participating ranks.
        inputs: at the root, an array for each rank; None elsewhere.
        output: this rank's array, to be filled.
        root: rank that sends them.
    """
    if inputs is None:
        transport.exchange([], _filled([(root, output)]), TAG, overlap=False).wait()
        return
    output[...] = inputs[root]
    others = [(rank, array) for rank, array in enumerate(inputs) if rank != root]
    transport.exchange(_filled(others), [], TAG, overlap=False).wait()


def exchange_compared(transport: Transport, inputs: Sequence[Array], outputs: Sequence[Array]) -> None:
    """Compare the lengths of what all ranks send to each other and expect, and exchange it. Collective.

    Args:
        transport: transport of the participating ranks.
        inputs: the arrays to send, by rank.
        outputs: the arrays to be filled, by rank.

    Raises:
        DistBackendError: on every rank, if a rank sends another length than the receiver expects.
    """
    lengths = [[array.size for array in arrays] for arrays in (inputs, outputs)]
    by_rank = transport.allgather(np.array(lengths, np.int64))
    differ = np.argwhere(by_rank[:, 0, :] != by_rank[:, 1, :].T)
    if differ.size:
        source, target = differ[0].tolist()
        raise DistBackendError(
            f"rank {source} sends {by_rank[source, 0, target]} elements to rank {target}, which expects "
            f"{by_rank[target, 1, source]}"
        )
    exchange_into(transport, inputs, outputs)


def _filled(messages: list[tuple[int, Array]]) -> list[tuple[int, Array]]:
    """Leave out messages without content: both sides know the length."""
    return [(peer, array) for peer, array in messages if array.size]
