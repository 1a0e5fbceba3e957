"""The interface of all reductions: reduce-scatter, all-gather, and both as one all-reduce."""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.division import divide
from lentando.comm.flat import blocks
from lentando.comm.transport import Array

__all__ = ["Each", "Reduction", "quiet", "store", "visit"]

Each: TypeAlias = Callable[[Array], object]
"""Called with each piece of a sum while it is in the cache; it may change the piece."""


class Reduction(Protocol):
    """A planned all-reduce of one buffer over all ranks.

    Attributes:
        shard: range of the buffer that this rank owns between reduce-scatter and all-gather. The shards of all ranks
            partition the buffer.
    """

    shard: slice

    def reduce_scatter(self, each: Each | None = None) -> Array:
        """Return the sum over ranks of this rank's shard, in float32 at least.

        The buffer itself is not changed. The result is scratch memory, valid until the next call.

        Args:
            each: function that is called once with every piece of the result, in any order, once it is complete.
        """

    def all_gather(self) -> None:
        """Fill the other ranks' shards of the buffer with the values that those ranks hold there."""

    def all_reduce(self, mean: bool) -> None:
        """Replace the buffer by its sum, or mean, over ranks."""


def quiet() -> np.errstate:
    """Suppress NumPy's warnings about overflow and NaN: the caller checks whether the result is finite."""
    return np.errstate(over="ignore", invalid="ignore")


def visit(total: Array, each: Each | None) -> None:
    """Call ``each`` with every block of a sum that became complete at once."""
    if each is not None:
        for block in blocks(total):
            each(total[block])


def store(total: Array, out: Array, divisor: int) -> None:
    """``out = total / divisor``, rounded once to the dtype of ``out``."""
    if divisor != 1 and total is not out and total.dtype == out.dtype:
        divide(total, divisor, out)  # one pass less
        return
    if divisor != 1:
        divide(total, divisor, total)
    if total is not out:
        with quiet():
            array_module(out).copyto(out, total, casting="same_kind")
