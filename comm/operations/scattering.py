"""Collectives that combine the arrays of all ranks, and give each rank some rows of the result."""

from collections.abc import Iterable, Sequence
from itertools import pairwise

import numpy as np

from lentando.comm.operations.collective import Agree, Collective, described, refused, refused_on_every_rank
from lentando.comm.operations.combining import combine_parts
from lentando.comm.operations.op import Average, Op, Sum, check_op
from lentando.comm.operations.scaling import check_factors, factors_in_words, scale
from lentando.comm.operations.slices import exchange_slices, slice_bounds
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.transport import Array, Transport

__all__ = ["grouped_reducescatter", "grouped_reducescatter_call", "reducescatter", "reducescatter_call"]


def reducescatter(
    array: Array,
    op: Op = Average,
    name: str | None = None,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> Array:
    """Combine the arrays of all ranks, and return this rank's rows of the result.

    The rows are divided among the ranks in order. If their number is not a multiple of the number of ranks, the first
    ranks get one row more.

    Args:
        array: array of numbers with one axis at least, of the same shape and dtype on all ranks; not
            changed. float16 and bfloat16 are summed in float32.
        op: ``Average`` or ``Sum``. An average of integers is rounded towards zero.
        name: name of the call, compared between ranks and shown in messages.
        prescale_factor: factor by which the array is multiplied before it is combined. The product of an integer is
            rounded towards zero.
        postscale_factor: factor by which the result is multiplied.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if ranks make different calls, or with different shapes, dtypes, ops or names.
        ConfigurationError: for a scalar, or another op.

    Example:
        >>> from lentando.comm.testing import run_ranks
        >>> from lentando.comm.world import simulated_rank
        >>> def worker(transport):
        ...     with simulated_rank(transport):  # in a program: init()
        ...         return reducescatter(np.arange(3.0) + transport.rank, Sum).tolist()
        >>> run_ranks(2, worker)
        [[1.0, 3.0], [5.0]]
    """
    return reducescatter_call(
        array,
        op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
        process_set=process_set,
    ).run()


@refused_on_every_rank("reducescatter")
def reducescatter_call(
    array: Array,
    op: Op = Average,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Collective[Array]:
    """One call of ``reducescatter``, with its arguments."""
    factors = _checked([array], op, prescale_factor, postscale_factor)
    if array.ndim == 0:
        return refused("reducescatter", "a scalar, which has no rows to divide", name, process_set)

    def execute(transport: Transport, agree: Agree) -> Array:
        agree()
        return _combined_rows(transport, array, op, *factors)

    arguments = [*described(array), op.value, *factors_in_words(*factors)]
    return Collective("reducescatter", arguments, name, process_set, execute)


def grouped_reducescatter(
    arrays: Iterable[Array],
    op: Op = Average,
    name: str | None = None,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> list[Array]:
    """Call ``reducescatter`` for several arrays at once, with one comparison between ranks. Returns the results."""
    return grouped_reducescatter_call(
        arrays,
        op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
        process_set=process_set,
    ).run()


@refused_on_every_rank("grouped_reducescatter")
def grouped_reducescatter_call(
    arrays: Iterable[Array],
    op: Op = Average,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Collective[list[Array]]:
    """One call of ``grouped_reducescatter``, with its arguments."""
    arrays = list(arrays)
    factors = _checked(arrays, op, prescale_factor, postscale_factor)
    if any(array.ndim == 0 for array in arrays):
        return refused("grouped_reducescatter", "a scalar, which has no rows to divide", name, process_set)

    def execute(transport: Transport, agree: Agree) -> list[Array]:
        agree()
        return [_combined_rows(transport, array, op, *factors) for array in arrays]

    arguments = [[described(array) for array in arrays], op.value, *factors_in_words(*factors)]
    return Collective("grouped_reducescatter", arguments, name, process_set, execute)


def _checked(arrays: Sequence[Array], op: Op, prescale_factor: float, postscale_factor: float) -> tuple[float, float]:
    for array in arrays:
        check_op(op, array.dtype, (Average, Sum), "reducescatter")
        check_factors(array.dtype, prescale_factor=prescale_factor, postscale_factor=postscale_factor)
    return float(prescale_factor), float(postscale_factor)


def _combined_rows(transport: Transport, array: Array, op: Op, prescale: float, postscale: float) -> Array:
    """This rank's rows of the combined array, which are summed in the order of ranks. Collective."""
    scaled = np.ascontiguousarray(array) if prescale == 1 else array.copy()
    scale(scaled, prescale)
    bounds = slice_bounds(array.shape[0], transport.size)
    parts = exchange_slices(transport, [scaled[start:end] for start, end in pairwise(bounds)])
    result = combine_parts(parts, mean=op is Average)
    scale(result, postscale)
    return result
