"""``join``: a rank without data contributes zeros to the sums of the others until all ranks have run out of data."""

import json
from contextvars import copy_context
from typing import Any

import numpy as np

from lentando.comm.agreement import Event, Intent, RanksHaveJoinedError, agree, ranks_where
from lentando.comm.asynchronous import operations_of
from lentando.comm.checked_calls import JOINABLE, called_by_others
from lentando.comm.dtypes import numpy_dtype
from lentando.comm.errors import MismatchError
from lentando.comm.numbering import numbers_of
from lentando.comm.operations.collective import Collective
from lentando.comm.operations.grouping import grouped_allreduce_call
from lentando.comm.operations.objects import barrier_call
from lentando.comm.operations.op import Op
from lentando.comm.operations.reducing import allreduce_call
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.comm.transport import Transport
from lentando.comm.turns import turn

__all__ = ["join"]


def join(process_set: ProcessSet = global_process_set) -> int:
    """Wait until all ranks have called this function. In the meantime, take part in the sums of the others with zeros.

    An average is divided by the number of all ranks, those that have joined included, as in Horovod. Calls that need
    values of all ranks (``allgather``, ``broadcast``, ``alltoall``, ``reducescatter``, ``allreduce`` by other ops, and
    those of objects) are errors on the ranks that make them. Optimizers of Lentando do not call ``allreduce``: they
    train with unequal numbers of batches inside their own ``join(optimizer)``.

    Args:
        process_set: the participating ranks.

    Returns:
        the rank that was the last to call this function, on every rank; its number in the whole job.

    Raises:
        MismatchError: on every rank, if another one saves, ends or does anything but to call collective operations.
        ConfigurationError: over a backend that admits one thread only, and in an elastic job.

    Example:
        >>> from lentando.comm import operations
        >>> from lentando.comm.asynchronous import close_operations, open_operations
        >>> from lentando.comm.testing import run_ranks
        >>> from lentando.comm.world import simulated_rank
        >>> def train(transport):
        ...     with simulated_rank(transport):  # in a program: init()
        ...         open_operations(transport)  # init() does this
        ...         array = np.ones(1)
        ...         for batch in range(3 + transport.rank):  # the last rank has the most data
        ...             array[0] = 1
        ...             operations.allreduce(array, operations.Sum)
        ...         last = join()
        ...         close_operations(transport)
        ...         return array.tolist(), last
        >>> run_ranks(3, train)
        [([3.0], 2), ([2.0], 2), ([1.0], 2)]
    """
    transport = transport_of(process_set)

    def zeros(operation: str, arguments: list[Any]) -> Collective[Any]:
        if operation == "barrier":
            return barrier_call(process_set=process_set)
        if operation == "allreduce":
            shape, dtype, op, *_ = arguments
            return allreduce_call(np.zeros(shape, numpy_dtype(dtype)), Op(op), process_set=process_set)
        described, op, *_ = arguments
        arrays = [np.zeros(shape, numpy_dtype(dtype)) for shape, dtype in described]
        return grouped_allreduce_call(arrays, Op(op), process_set=process_set)

    if transport.size == 1:
        return numbers_of(transport)[0]
    submitted = operations_of(transport)
    here = copy_context()  # the background thread does not know a simulated rank
    handle = submitted.join(lambda operation, arguments: here.run(zeros, operation, arguments))
    try:
        with turn(transport, Intent(Event.JOIN)):
            met = 0
            while isinstance(found := _next_call(transport, met), tuple):
                met, (operation, *arguments) = found
                zeros(operation, arguments).execute(transport)
    except MismatchError:
        submitted.cancel_join()
        raise
    last = handle.wait()
    # `last` is the rank whose message reached rank 0 last. Messages may overtake each other, so that it may have joined
    # before another one. The ranks in `found` have taken part in the fewest calls of others: these joined last.
    latest = [numbers_of(transport)[rank] for rank in found]
    return last if last in latest else latest[-1]


def _next_call(transport: Transport, met: int) -> tuple[int, list[Any]] | list[int]:
    """The next blocking call of the others in which this rank takes part. Collective.

    Args:
        transport: transport of the ranks.
        met: number of calls of others that have been made since this rank has joined.

    Returns:
        That number now, and the operation with its arguments. Once all ranks have joined: the ranks that joined last,
        according to the calls of others.
    """
    problem: str | None = ""
    while problem is not None:
        try:
            by_rank = agree(transport, Intent(Event.JOIN), lambda: "has called join()", {**JOINABLE, "met": met})
        except RanksHaveJoinedError as found:  # noqa: PERF203 - each time, all ranks have communicated
            met += 1
            described, problem = called_by_others(transport, found, None)
        else:
            return ranks_where(by_rank["met"] == by_rank["met"].min())
    return met, json.loads(described)
