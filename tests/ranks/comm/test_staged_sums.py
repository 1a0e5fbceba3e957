"""Sums of arrays in ordinary memory through staging memory, over a real MPI."""

from itertools import accumulate, pairwise

import numpy as np
from numpy.typing import DTypeLike
from operation_checks import bits_on_each_rank
from ring_reference import values_by_rank

from lentando.comm.collectives import all_reduce
from lentando.comm.dtypes import accumulator_dtype, bfloat16
from lentando.comm.reductions.node import open_node_memory
from lentando.comm.reductions.staged import PIECES, STAGED_FROM_BYTES, StagedSums, staged_sums
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport

PIECE_BYTES = 4096
ARRAYS: list[tuple[DTypeLike, int]] = [
    *((dtype, elements) for dtype in (np.float32, np.float64, np.float16, bfloat16) for elements in (1, 3, 1003)),
    *((np.float32, PIECE_BYTES // 4 * pieces + more) for pieces in (1, 2, 3, 7) for more in (-1, 0, 1)),
    (np.int64, 2000),
    (np.int8, 9000),
]
"""With fewer elements than ranks, and up to eight pieces."""


def in_rank_order(by_rank: list[Array], *, mean: bool) -> Array:
    """The sum, formed one rank after the other and rounded once."""
    *_, total = accumulate(values.astype(accumulator_dtype(values.dtype)) for values in by_rank)
    return (total / total.dtype.type(len(by_rank)) if mean else total).astype(by_rank[0].dtype)


def given(transport: Transport, dtype: DTypeLike, elements: int) -> list[Array]:
    if np.dtype(dtype).kind == "i":
        random = np.random.default_rng(elements)
        return [random.integers(-9, 9, elements).astype(dtype) for _ in range(transport.size)]
    return values_by_rank(transport.size, elements, dtype)


def test_arrays_are_summed_in_the_order_of_ranks_bit_identically(several: Transport) -> None:
    """One after the other through the same memory, of different dtypes and lengths: none sees values of another."""
    memory = open_node_memory(several, shared_zeros(PIECES * PIECE_BYTES, np.dtype(np.uint8)))
    assert memory is not None
    sums = StagedSums(several.rank, memory.buffers)
    for mean in (False, True):
        results, expected = [], []
        for dtype, elements in ARRAYS:
            if mean and np.dtype(dtype).kind == "i":
                continue
            by_rank = given(several, dtype, elements)
            results.append(by_rank[several.rank].copy())
            sums.all_reduce(several, results[-1], mean=mean)
            expected.append(in_rank_order(by_rank, mean=mean))
        for found, values in zip(results, expected, strict=True):
            assert bits_on_each_rank(several, found) == {values.tobytes()}


def test_large_arrays_in_any_memory_take_this_way_by_default(several: Transport) -> None:
    by_rank = given(several, np.float32, STAGED_FROM_BYTES // 2 + 1)
    array = by_rank[several.rank].copy()
    all_reduce(several, array, mean=True)
    assert bits_on_each_rank(several, array) == {in_rank_order(by_rank, mean=True).tobytes()}


def test_memory_is_opened_once(several: Transport) -> None:
    array = np.ones(STAGED_FROM_BYTES // 4, np.float32)
    opened = [staged_sums(several, array) for _ in range(3)]
    assert opened[0] is not None
    assert all(first is second for first, second in pairwise(opened))
    assert staged_sums(several, array[1:]) is None  # smaller ones are left to the backend
