"""Sums over ranks that may be formed together with others, in one buffer."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lentando.comm.transport import Array

__all__ = ["Summation"]


@dataclass(slots=True)
class Summation:
    """Arrays that are replaced by their sum or mean over ranks.

    Attributes:
        arrays: contiguous arrays of one dtype, of real numbers or integers.
        is_mean: whether the sum is divided by the number of ranks.
        before: changes an array in place before it is summed; None if nothing has to be changed.
        after: changes the result in place; None if nothing has to be changed.
    """

    arrays: Sequence[Array]
    is_mean: bool
    before: Callable[[Array], object] | None = None
    after: Callable[[Array], object] | None = None

    def scale_before(self, array: Array) -> None:
        """Change one of the arrays as it is to be summed."""
        if self.before is not None:
            self.before(array)

    def scale_after(self, array: Array) -> None:
        """Change one of the arrays that holds its sum or mean."""
        if self.after is not None:
            self.after(array)
