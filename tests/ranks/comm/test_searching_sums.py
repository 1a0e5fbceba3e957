"""Sums that find the ranks whose values are not finite, through shared memory and through staging memory."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import DTypeLike
from operation_checks import bits_on_each_rank
from ring_reference import along_the_ring, values_by_rank

from lentando.comm.dtypes import bfloat16
from lentando.comm.reductions.node import NodeReduction, open_node_memory
from lentando.comm.reductions.staged import PIECES, StagedSums
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport

PIECE_BYTES = 4096
SIZES = (1, 7, 1024, 10_007)
DTYPES: list[DTypeLike] = [np.float32, np.float64, bfloat16]
Search = Callable[[Array, bool], tuple[Array, Array]]
"""Sums these values; returns the sum, and by rank the number of the first element that is not finite."""


@pytest.fixture(params=["shared", "staged"])
def search(request: pytest.FixtureRequest, several: Transport) -> Search:
    memory = open_node_memory(several, shared_zeros(PIECES * PIECE_BYTES, np.dtype(np.uint8)))
    assert memory is not None
    sums = StagedSums(several.rank, memory.buffers)

    def through_shared_memory(values: Array, mean: bool) -> tuple[Array, Array]:
        buffer = shared_zeros(values.size, values.dtype)
        buffer[:] = values
        opened = open_node_memory(several, buffer)
        assert opened is not None
        reduction = NodeReduction(several, buffer, opened)
        assert reduction.is_within_node
        several.barrier()
        return buffer, reduction.all_reduce_and_search(mean)

    def through_staging_memory(values: Array, mean: bool) -> tuple[Array, Array]:
        # Each rank cuts the values elsewhere.
        cuts = sorted({values.size * (several.rank + step) // (several.size + 3) for step in range(3)})
        arrays = [part.copy() for part in np.split(values, cuts) if part.size]
        firsts = sums.all_reduce_and_search(several, arrays, mean=mean)
        return np.concatenate(arrays), firsts

    return through_shared_memory if request.param == "shared" else through_staging_memory


@pytest.mark.parametrize("mean", [False, True])
def test_sums_are_those_of_the_ring(several: Transport, search: Search, mean: bool) -> None:
    for dtype in DTYPES:
        for elements in SIZES:
            by_rank = values_by_rank(several.size, elements, dtype)
            total, firsts = search(by_rank[several.rank], mean)
            assert bits_on_each_rank(several, total) == {along_the_ring(by_rank, mean=mean).tobytes()}
            assert firsts.tolist() == [elements] * several.size


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_the_first_element_of_each_rank_that_is_not_finite_is_found(
    several: Transport, search: Search, bad: float
) -> None:
    for elements in SIZES:
        by_rank = values_by_rank(several.size, elements, np.float32)
        expected = [elements] * several.size
        for rank in (0, several.size - 1):
            expected[rank] = elements * (rank + 1) // (several.size + 1)
            by_rank[rank][[expected[rank], elements - 1]] = bad
        _, firsts = search(by_rank[several.rank], True)
        assert firsts.tolist() == expected


def test_a_sum_that_overflows_is_not_taken_for_values_that_are_not_finite(several: Transport, search: Search) -> None:
    values = np.full(100, np.finfo(np.float32).max)
    total, firsts = search(values, False)
    assert np.isinf(total).all()
    assert firsts.tolist() == [100] * several.size
