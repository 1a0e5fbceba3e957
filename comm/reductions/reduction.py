"""What every way to reduce a buffer over all ranks offers: the two halves of an all-reduce, and both together."""

from collections.abc import Callable
from typing import Protocol, TypeAlias

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.flat import blocks
from lentando.comm.transport import Array

__all__ = ["Each", "Reduction", "quiet", "store", "visit"]

Each: TypeAlias = Callable[[Array], object]
"""What is done with each piece of a sum while it is in the cache; it may change the piece."""


class Reduction(Protocol):
    """A planned all-reduce of one buffer over all ranks.

    Attributes:
        shard: the range of the buffer that this rank owns between the two halves. The shards of all ranks
            partition the buffer.
    """

    shard: slice

    def reduce_scatter(self, each: Each | None = None) -> Array:
        """The sum over ranks of this rank's shard, in float32 at least.

        The buffer itself is not touched. The result is scratch memory: valid until the next call.

        Args:
            each: called once with every piece of the result, in any order, as soon as it is complete.
        """

    def all_gather(self) -> None:
        """Overwrite every other rank's shard of the buffer with what that rank holds there."""

    def all_reduce(self, mean: bool) -> None:
        """Replace the buffer by its sum, or mean, over ranks."""


def quiet() -> np.errstate:
    """Infinities and NaNs are the caller's to find in the result: a warning in the middle of a sum helps nobody."""
    return np.errstate(over="ignore", invalid="ignore")


def visit(total: Array, each: Each | None) -> None:
    """Let ``each`` see all of a sum that became complete at once."""
    if each is not None:
        for block in blocks(total):
            each(total[block])


def store(total: Array, out: Array, divisor: int) -> None:
    """``out = total / divisor``, rounded to ``out``'s dtype once."""
    if divisor != 1:
        np.true_divide(total, divisor, out=total)
    if total is not out:
        with quiet():
            array_module(out).copyto(out, total, casting="same_kind")
