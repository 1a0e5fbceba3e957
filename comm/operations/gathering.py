"""Collectives that concatenate the arrays of all ranks."""

import numpy as np

from lentando.comm.operations.collective import Agree, Collective, refused_on_every_rank
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.transport import Array, Transport

__all__ = ["allgather", "allgather_call"]


def allgather(array: Array, name: str | None = None, process_set: ProcessSet = global_process_set) -> Array:
    """Concatenate the arrays of all ranks along the first axis, in which their lengths may differ.

    Args:
        array: array of any numeric dtype; dtype and all axes but the first are equal on all ranks.
        name: name of the call, compared between ranks and shown in messages.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if names, dtypes or the other axes differ between ranks.
    """
    return allgather_call(array, name=name, process_set=process_set).run()


@refused_on_every_rank("allgather")
def allgather_call(
    array: Array, *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Collective[Array]:
    """One call of ``allgather``, with its arguments."""
    rows = array.reshape(1) if array.ndim == 0 else array

    def execute(transport: Transport, agree: Agree) -> Array:
        agree()
        lengths = transport.allgather(np.array([rows.shape[0]], np.int64))[:, 0]
        padded = np.zeros((int(lengths.max()), *rows.shape[1:]), rows.dtype)
        padded[: rows.shape[0]] = rows
        gathered = transport.allgather(padded)
        return np.concatenate([gathered[rank, :length] for rank, length in enumerate(lengths)])

    return Collective("allgather", ["any length", *rows.shape[1:], rows.dtype.name], name, process_set, execute)
