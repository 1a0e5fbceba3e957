"""The collective in which each rank sends some rows of its array to each rank."""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any

import numpy as np

from lentando.comm.errors import TransportError
from lentando.comm.operations.collective import Agree, Collective, refused, refused_on_every_rank
from lentando.comm.operations.slices import exchange_slices
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.comm.transport import Array, Transport

__all__ = ["alltoall", "alltoall_call"]


def alltoall(
    array: Array,
    splits: "Sequence[int] | Array | None" = None,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> tuple[Array, Array]:
    """Send some rows of ``array`` to each rank, and concatenate the rows that all ranks have sent to this one.

    Args:
        array: array of any numeric dtype, with one axis at least; dtype and all axes but the first are equal
            on all ranks.
        splits: numbers of rows for each rank, by rank; their sum is the length of the array. By default all ranks get
            equally many. They may be zero, and differ between ranks.
        name: name of the call, compared between ranks and shown in messages.
        process_set: the participating ranks.

    Returns:
        the rows received, in the order of the ranks that have sent them, and how many each rank has sent (int32).

    Raises:
        ConfigurationError: on every rank, if splits do not fit on all ranks.
        MismatchError: on every rank, if they do not fit on some of the ranks only, or if names, dtypes or the other
            axes differ between ranks.

    Example:
        >>> from lentando.comm.testing import run_ranks
        >>> from lentando.comm.world import simulated_rank
        >>> def worker(transport):
        ...     with simulated_rank(transport):  # in a program: init()
        ...         rows, received = alltoall(np.arange(3) + 10 * transport.rank, splits=[1, 2])
        ...         return rows.tolist(), received.tolist()
        >>> run_ranks(2, worker)
        [([0, 10], [1, 1]), ([1, 2, 11, 12], [2, 2])]
    """
    return alltoall_call(array, splits, name=name, process_set=process_set).run()


@refused_on_every_rank("alltoall")
def alltoall_call(
    array: Array,
    splits: "Sequence[int] | Array | None" = None,
    *,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Collective[tuple[Array, Array]]:
    """One call of ``alltoall``, with its arguments."""
    size = transport_of(process_set).size
    if array.ndim == 0:
        return refused("alltoall", "a scalar, which has no rows to send", name, process_set)
    rows = array.shape[0]
    if splits is None and rows % size:
        uneven = f"{rows} rows and no splits: expected splits, or a multiple of the {size} ranks"
        return refused("alltoall", uneven, name, process_set)
    try:
        lengths = np.full(size, rows // size) if splits is None else np.asarray(splits)
    except ValueError:  # lists of different lengths
        return refused("alltoall", f"splits {splits!r}: expected {size} integers, one for each rank", name, process_set)
    problem = _problem_with(lengths, rows, size)
    if problem is not None:
        return refused("alltoall", problem, name, process_set)

    def execute(transport: Transport, agree: Agree) -> tuple[Array, Array]:
        agree()
        if transport.size != size:
            raise TransportError(
                f"alltoall: the splits are for {size} ranks, and {transport.size} are left: call it again with others"
            )
        all_lengths = transport.allgather(lengths.astype(np.int64))
        received = all_lengths[:, transport.rank]
        bounds = [0, *accumulate(lengths.tolist())]
        rows_in_order = np.ascontiguousarray(array)
        sends = [rows_in_order[start:end] for start, end in pairwise(bounds)]
        parts = exchange_slices(transport, sends, received.tolist())
        return np.concatenate(parts), received.astype(np.int32)

    return Collective("alltoall", ["any length", *array.shape[1:], array.dtype.name], name, process_set, execute)


def _problem_with(splits: Any, rows: int, size: int) -> str | None:
    """The reason why these splits cannot work, as a noun phrase; None if they can."""
    if splits.ndim != 1 or splits.dtype.kind not in "iu":
        return f"splits of {splits.dtype} and shape {list(splits.shape)}: expected {size} integers, one for each rank"
    if splits.size != size:
        return f"splits for {splits.size} ranks: expected one for each of {size}"
    if (splits < 0).any():
        return f"a negative split: {splits.tolist()}"
    total = sum(splits.tolist())  # Python's integers do not overflow
    if total != rows:
        return f"splits that sum to {total}: expected the {rows} rows of the array"
    return None
