"""Collectives that combine the arrays of all ranks element by element."""

from typing import Any

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations.collective import Agree, Collective, described
from lentando.comm.operations.combining import as_numbers, combine, summation_of
from lentando.comm.operations.op import Average, Max, Min, Op, Sum, check_op
from lentando.comm.operations.scaling import check_factors, factors_in_words, scale
from lentando.comm.process_sets import ProcessSet, global_process_set, transport_of
from lentando.comm.transport import Array, Transport

__all__ = ["allreduce", "allreduce_call", "allreduce_number"]


def allreduce(
    array: Array,
    op: Op = Average,
    name: str | None = None,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    process_set: ProcessSet = global_process_set,
) -> None:
    """Combine ``array`` over all ranks, in place. The result is bit-identical on every rank.

    Args:
        array: contiguous array of any shape and numeric dtype, equal on all ranks. float16 and bfloat16 are summed in
            float32, complex numbers as pairs of real ones.
        op: ``Average`` (of integers: rounded towards zero), ``Sum``, ``Min``, ``Max`` or ``Product`` (not of complex
            numbers), or ``Adasum`` (of floating point). Of booleans, only ``Min`` (True if all ranks have True) and
            ``Max`` (True if any rank has) are defined.
        name: name of the call, compared between ranks and shown in messages.
        prescale_factor: factor by which the array is multiplied before it is combined. The product of an integer is
            rounded towards zero.
        postscale_factor: factor by which the result is multiplied.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if ranks make different calls, or with different shapes, dtypes, ops or names.
        ConfigurationError: if ``op`` is not defined for the dtype, or this rank is not in the process set.

    Example:
        >>> from lentando.comm.testing import run_ranks
        >>> from lentando.comm.world import simulated_rank
        >>> def average(transport):
        ...     with simulated_rank(transport):  # in a program: init()
        ...         array = np.array([1.0, 2.0]) * transport.rank
        ...         allreduce(array)
        ...         return array.tolist()
        >>> run_ranks(3, average)[0]
        [1.0, 2.0]
    """
    allreduce_call(
        array,
        op,
        prescale_factor=prescale_factor,
        postscale_factor=postscale_factor,
        name=name,
        process_set=process_set,
    ).run()


def allreduce_call(
    array: Array,
    op: Op = Average,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
) -> Collective[None]:
    """One call of ``allreduce``, with its arguments."""
    check_op(op, array.dtype)
    check_factors(array.dtype, prescale_factor=prescale_factor, postscale_factor=postscale_factor)
    factors = float(prescale_factor), float(postscale_factor)
    arguments = [*described(array), op.value, *factors_in_words(*factors)]
    numbers = as_numbers(array)

    def execute(transport: Transport, agree: Agree) -> None:
        agree()
        scale(numbers, factors[0])
        combine(transport, numbers, op)
        scale(numbers, factors[1])

    summation = summation_of([numbers], op, factors)
    return Collective("allreduce", arguments, name, process_set, execute, [array], summation)


def allreduce_number(
    value: float, op: Op = Average, name: str | None = None, process_set: ProcessSet = global_process_set
) -> float:
    """Combine a number over all ranks, in float64, or in int64 where the result is an integer.

    Args:
        value: a Python float, int or bool, of the same type on all ranks.
        op: as for ``allreduce``. ``Average`` returns a float, ``Sum`` of integers and booleans an int, ``Min`` and
            ``Max`` of booleans a bool.
        name: name of the call, compared between ranks and shown in messages.
        process_set: the participating ranks.

    Raises:
        ConfigurationError: for an integer so large that int64 may not hold the result.
        MismatchError: as for ``allreduce``.
    """
    dtype: np.dtype[Any] = np.dtype(np.float64)
    if isinstance(value, bool) and op in (Min, Max):
        dtype = np.dtype(np.bool_)
    elif isinstance(value, int) and op is not Average:
        dtype = np.dtype(np.int64)
    if dtype == np.int64:
        most = 63 - ((transport_of(process_set).size - 1).bit_length() if op is Sum else 0)
        if not -(2**most) <= value < 2**most:
            raise ConfigurationError(
                f"allreduce of an integer of {int(value).bit_length()} bits: expected {most} at most, so that int64 "
                "holds the result"
            )
    array = np.array([value], dtype)
    allreduce(array, op, name, process_set=process_set)
    result: float = array.tolist()[0]
    return result
