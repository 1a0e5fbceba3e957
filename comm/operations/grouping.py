"""Collectives of several arrays at once, with one comparison between ranks and one message for each dtype."""

from collections.abc import Iterable
from math import prod

import numpy as np

from lentando.comm.operations.collective import Agree, Collective, check_in_place, described, refused_on_every_rank
from lentando.comm.operations.combining import as_numbers, combine, summation_of
from lentando.comm.operations.op import Average, Op, check_op
from lentando.comm.operations.scaling import check_factors, factors_in_words, scale
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.transport import Array, Transport, as_bytes

__all__ = ["grouped_allgather", "grouped_allgather_call", "grouped_allreduce", "grouped_allreduce_call"]


def grouped_allreduce(
    arrays: Iterable[Array],
    op: Op = Average,
    name: str | None = None,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Combine several arrays over all ranks, in place, as ``allreduce`` combines each.

    Arrays of one dtype are sent together. The last bits of a sum may therefore differ from those of separate calls.

    Args:
        arrays: contiguous arrays; shapes and dtypes are equal on all ranks.
        op: as for ``allreduce``. Adasum combines each array separately, with its own dot products.
        name: name of the call, compared between ranks and shown in messages.
        prescale_factor: factor by which the arrays are multiplied before they are combined.
        postscale_factor: factor by which the results are multiplied.
        process_set: the participating ranks.

    Raises:
        MismatchError, ConfigurationError: as for ``allreduce``.

    Example:
        >>> from lentando.comm.operations import Sum
        >>> from lentando.comm.testing import run_ranks
        >>> from lentando.comm.world import simulated_rank
        >>> def worker(transport):
        ...     with simulated_rank(transport):  # in a program: init()
        ...         arrays = [np.ones(2), np.full((), transport.rank), np.zeros(0)]
        ...         grouped_allreduce(arrays, Sum)
        ...         return [array.tolist() for array in arrays]
        >>> run_ranks(3, worker)[0]
        [[3.0, 3.0], 3, []]
    """
    grouped_allreduce_call(
        arrays,
        op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
        process_set=process_set,
    ).run()


@refused_on_every_rank("grouped_allreduce")
def grouped_allreduce_call(
    arrays: Iterable[Array],
    op: Op = Average,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Collective[None]:
    """One call of ``grouped_allreduce``, with its arguments."""
    by_dtype: dict[np.dtype[np.generic], list[Array]] = {}
    arrays = list(arrays)
    for array in arrays:
        check_in_place(array)
        check_op(op, array.dtype)
        check_factors(array.dtype, prescale_factor=prescale_factor, postscale_factor=postscale_factor)
        numbers = as_numbers(array)
        by_dtype.setdefault(numbers.dtype, []).append(numbers.reshape(-1))
    factors = float(prescale_factor), float(postscale_factor)

    def execute(transport: Transport, agree: Agree) -> None:
        agree()
        for same in by_dtype.values():
            flat = same[0] if len(same) == 1 else np.concatenate(same)
            scale(flat, factors[0])
            combine(transport, flat, op, [part.size for part in same])
            scale(flat, factors[1])
            if len(same) > 1:
                ends = np.cumsum([part.size for part in same])
                for part, end in zip(same, ends, strict=True):
                    part[...] = flat[end - part.size : end]

    arguments = [[described(array) for array in arrays], op.value, *factors_in_words(*factors)]
    same_dtype = [part for parts in by_dtype.values() for part in parts] if len(by_dtype) == 1 else []
    summation = summation_of(same_dtype, op, factors)
    return Collective("grouped_allreduce", arguments, name, process_set, execute, arrays, summation)


def grouped_allgather(
    arrays: Iterable[Array], name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Array]:
    """Concatenate several arrays of all ranks, as ``allgather`` does with each, and return the results.

    Args:
        arrays: arrays of any numeric dtypes; dtypes and all axes but the first are equal on all ranks.
        name: name of the call, compared between ranks and shown in messages.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, as for ``allgather``.
    """
    return grouped_allgather_call(arrays, name=name, process_set=process_set).run()


@refused_on_every_rank("grouped_allgather")
def grouped_allgather_call(
    arrays: Iterable[Array], *, name: str | None = None, process_set: ProcessSet = global_process_set
) -> Collective[list[Array]]:
    """One call of ``grouped_allgather``, with its arguments."""
    parts = [array.reshape(1) if array.ndim == 0 else array for array in arrays]

    def execute(transport: Transport, agree: Agree) -> list[Array]:
        agree()
        lengths = transport.allgather(np.array([part.shape[0] for part in parts], np.int64))
        row_bytes = [prod(part.shape[1:]) * part.dtype.itemsize for part in parts]
        ends = np.cumsum(lengths * np.array(row_bytes, np.int64), axis=1)
        longest = int(ends[:, -1].max()) if parts else 0
        sent = np.zeros(longest, np.uint8)
        for part, end in zip(parts, ends[transport.rank], strict=True):
            sent[end - part.nbytes : end] = as_bytes(np.ascontiguousarray(part))
        gathered = transport.allgather(sent)
        results = []
        for number, part in enumerate(parts):
            result: Array = np.empty((int(lengths[:, number].sum()), *part.shape[1:]), part.dtype)
            position = 0
            memory = as_bytes(result)
            for rank, end in enumerate(ends[:, number]):
                count = int(lengths[rank, number]) * row_bytes[number]
                memory[position : position + count] = gathered[rank, end - count : end]
                position += count
            results.append(result)
        return results

    arguments = [["any length", *part.shape[1:], part.dtype.name] for part in parts]
    return Collective("grouped_allgather", arguments, name, process_set, execute)
