"""Sums over ranks that send to each other directly."""

from itertools import accumulate

import numpy as np
import pytest
from numpy.typing import DTypeLike
from operation_checks import bits_on_each_rank
from ring_reference import values_by_rank

from lentando.comm.reductions.direct import IN_ONE_ROUND_BYTES, DirectSums
from lentando.comm.transport import Array, Transport


def given(transport: Transport, dtype: DTypeLike, elements: int) -> list[Array]:
    if np.dtype(dtype).kind == "i":
        random = np.random.default_rng(elements)
        return [random.integers(-9, 9, elements).astype(dtype) for _ in range(transport.size)]
    return values_by_rank(transport.size, elements, dtype)


def in_rank_order(by_rank: list[Array], *, mean: bool) -> Array:
    *_, total = accumulate(by_rank)
    return total / total.dtype.type(len(by_rank)) if mean else total


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.int64], ids=str)
def test_sums_in_the_order_of_ranks_bit_identically(transport: Transport, dtype: DTypeLike) -> None:
    """One after the other in the same scratch memory: in one round, in two, and with parts without elements."""
    sums = DirectSums(transport)
    itemsize = np.dtype(dtype).itemsize
    last_whole = IN_ONE_ROUND_BYTES // transport.size // itemsize
    for elements in (1, 5, last_whole, last_whole + 1, 3 * last_whole + 2, 7):
        for mean in (False, True)[: 1 if np.dtype(dtype).kind == "i" else 2]:
            by_rank = given(transport, dtype, elements)
            array = by_rank[transport.rank].copy()
            sums.all_reduce(array, mean=mean)
            assert bits_on_each_rank(transport, array) == {in_rank_order(by_rank, mean=mean).tobytes()}, elements


@pytest.mark.parametrize("elements", [3, IN_ONE_ROUND_BYTES])
def test_arrays_change_only_after_the_first_barrier(transport: Transport, elements: int) -> None:
    sums = DirectSums(transport)
    array = np.full(elements, transport.rank + 1.0)
    seen: list[bool] = []

    def first_barrier() -> None:
        transport.barrier()
        seen.append(bool((array == transport.rank + 1).all()))

    sums.all_reduce(array, mean=False, first_barrier=first_barrier)
    assert seen == [True]
    assert (array == sum(range(1, transport.size + 1))).all()
