"""What the ring must compute, bit-identically, in a few lines of NumPy that share nothing with it."""

import numpy as np
from numpy.typing import DTypeLike

from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.transport import Array


def values_by_rank(size: int, elements: int, dtype: DTypeLike) -> list[Array]:
    """Every rank's numbers, known to all; of every magnitude, so that the order of summation shows in the bits."""
    rng = np.random.default_rng(elements)
    return [(rng.standard_normal(elements) * 10.0 ** rng.integers(-3, 3, elements)).astype(dtype) for _ in range(size)]


def along_the_ring(by_rank: list[Array], *, mean: bool) -> Array:
    """The same sums, formed in the same order, without a ring: chunk c starts at rank c and visits c + 1, c + 2, ..."""
    size, result = len(by_rank), np.empty_like(by_rank[0])
    for number, part in enumerate(np.array_split(np.arange(result.size), size)):
        total = by_rank[number][part].astype(accumulator_dtype(result.dtype))
        for step in range(1, size):
            total = total + by_rank[(number + step) % size][part]
        result[part] = total / size if mean else total
    return result
