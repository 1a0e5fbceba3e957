"""Collectives that combine the arrays of all ranks element by element."""

import json
from functools import lru_cache, partial
from math import prod
from typing import Any

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations.collective import (
    Agree,
    Collective,
    check_in_place,
    described,
    refused,
    refused_on_every_rank,
)
from lentando.comm.operations.combining import as_numbers, combine, summation_of
from lentando.comm.operations.op import Average, Max, Min, Op, Product, Sum, check_op
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


@refused_on_every_rank("allreduce")
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
    check_in_place(array)
    if type(prescale_factor) is not float or type(postscale_factor) is not float or not isinstance(op, Op):
        check_op(op, array.dtype)
        check_factors(array.dtype, prescale_factor=prescale_factor, postscale_factor=postscale_factor)
    factors = float(prescale_factor), float(postscale_factor)
    arguments, description = _described_call(array.shape, array.dtype, op, *factors)
    numbers = as_numbers(array)
    execute = partial(_combine_scaled, numbers, op, factors)
    summation = summation_of([numbers], op, factors)
    return Collective("allreduce", arguments, name, process_set, execute, (array,), summation, description)


def _combine_scaled(numbers: Array, op: Op, factors: tuple[float, float], transport: Transport, agree: Agree) -> None:
    agree()
    scale(numbers, factors[0])
    combine(transport, numbers, op)
    scale(numbers, factors[1])


@lru_cache(maxsize=8192)  # of a training loop, in which the same calls are made again and again
def _described_call(
    shape: tuple[int, ...], dtype: "np.dtype[np.generic]", op: Op, prescale_factor: float, postscale_factor: float
) -> tuple[list[Any], str]:
    """What must be equal on all ranks in a call of ``allreduce``, and the same with its name as JSON."""
    check_op(op, dtype)
    check_factors(dtype, prescale_factor=prescale_factor, postscale_factor=postscale_factor)
    arguments = [list(shape), dtype.name, op.value, *factors_in_words(prescale_factor, postscale_factor)]
    return arguments, json.dumps(["allreduce", *arguments])


def allreduce_number(
    value: float,
    op: Op = Average,
    name: str | None = None,
    process_set: ProcessSet = global_process_set,
    *,
    prescale_factor: float = 1.0,
    postscale_factor: float = 1.0,
) -> float:
    """Combine a number over all ranks, in float64, or in integers where the result is one.

    Args:
        value: a Python float, int or bool, of the same type on all ranks.
        op: as for ``allreduce``. ``Average`` returns a float, ``Sum`` of integers and booleans an int, ``Min`` and
            ``Max`` of booleans a bool. ``Product`` of integers is exact, however large it is.
        name: name of the call, compared between ranks and shown in messages.
        process_set: the participating ranks.
        prescale_factor: factor by which the number is multiplied before it is combined. The product of an integer and
            a float is a float.
        postscale_factor: factor by which the result is multiplied.

    Raises:
        ConfigurationError: on every rank, for an integer so large that int64 may not hold it, or the sum; or that
            float64 does not hold where the result is a float.
        MismatchError: as for ``allreduce``; and on every rank, if the number of some of the ranks is too large.

    Example:
        >>> from lentando.comm.operations import Product
        >>> from lentando.comm.testing import run_ranks
        >>> from lentando.comm.world import simulated_rank
        >>> def worker(transport):
        ...     with simulated_rank(transport):  # in a program: init()
        ...         return allreduce_number(10**12, Product)
        >>> run_ranks(2, worker) == [10**24, 10**24]
        True
    """
    size = transport_of(process_set).size
    try:
        check_factors(np.dtype(np.float64), prescale_factor=prescale_factor, postscale_factor=postscale_factor)
        array = _one_number(_scaled(value, prescale_factor), op, size)
    except ConfigurationError as error:
        return float(refused("allreduce", error, name, process_set).run())
    if op is Product and array.dtype == np.int64:
        result: float = _product_call(array, name, process_set).run()
    else:
        allreduce(array, op, name, process_set=process_set)
        result = array.tolist()[0]
    try:
        return _scaled(result, postscale_factor)
    except ConfigurationError as error:
        error.is_of_begun_call = True
        raise


def _one_number(value: float, op: Op, size: int) -> Array:
    """A number as an array of the dtype in which it is combined.

    Raises:
        ConfigurationError: if that dtype does not hold it, or the sum over ``size`` ranks of numbers that large.
    """
    if isinstance(value, bool) and op in (Min, Max):
        return np.array([value])
    if not isinstance(value, int) or op is Average:
        try:
            return np.array([value], np.float64)
        except OverflowError:
            raise _too_large(value, 1024, "float64 holds it") from None
    most = 63 - ((size - 1).bit_length() if op is Sum else 0)
    if not -(2**most) <= value < 2**most:
        raise _too_large(value, most, "int64 holds the result" if op is not Product else "int64 holds it")
    return np.array([value], np.int64)


def _product_call(number: Array, name: str | None, process_set: ProcessSet) -> Collective[int]:
    """The product of the integers of all ranks, which is formed in Python's integers: int64 may not hold it."""

    def execute(transport: Transport, agree: Agree) -> int:
        agree()
        return prod(transport.allgather(number)[:, 0].tolist())

    return Collective("allreduce", [*described(number), Product.value], name, process_set, execute)


def _scaled(number: float, factor: float) -> float:
    """The product of a number and a factor; the number itself, of the same type, for the factor 1.

    Raises:
        ConfigurationError: if it is an integer that float64 does not hold.
    """
    if factor == 1.0:
        return number
    try:
        return number * factor
    except OverflowError:
        raise _too_large(number, 1024, "it can be multiplied by a factor") from None


def _too_large(value: float, most: int, purpose: str) -> ConfigurationError:
    return ConfigurationError(
        f"allreduce of an integer of {int(value).bit_length()} bits: expected {most} at most, so that {purpose}"
    )
