"""Averages over some of the ranks: on uneven data (``join``), or if the values of a rank are not finite."""

from dataclasses import dataclass

from lentando.comm.array_module import array_module
from lentando.comm.flat import FlatBuffer, Range
from lentando.comm.reductions.reduction import Reduction, store
from lentando.comm.transport import Array

__all__ = ["PartialAverage", "mean_over_some"]


@dataclass(frozen=True)
class PartialAverage:
    """How a rank takes part in an average that is not over all ranks.

    Attributes:
        is_active: whether this rank's numbers count.
        active_ranks: number of ranks whose numbers count.
        finite_ranks: number of ranks whose values are finite.
        is_mixed: whether parameters count on all ranks with finite values, because gossip has carried a share of the
            active ranks' parameters to the others, so that only the sum over all ranks holds the result of training.
            Gossip does not carry statistics.
        is_finite: whether this rank's values are finite. If not, none of them counts.
        is_over_debiased: whether the average is over de-biased parameters z (push-sum), because those of some rank are
            missing, and not over the biased x.
        weight: number by which the movement of this rank is multiplied, > 0; the mean of those of the active ranks is
            1, without clipping and normalized weights. Only an average of movements takes others than 1
            (``lentando.optimizers.rules.movement_average``).
        in_full: whether numbers are sent in full precision and unweighted, because the program has set weights.
    """

    is_active: bool
    active_ranks: int
    finite_ranks: int
    is_mixed: bool = False
    is_finite: bool = True
    is_over_debiased: bool = False
    weight: float = 1.0
    in_full: bool = False

    @property
    def factor(self) -> float:
        """Factor of this rank's movement: its weight, and 0 if its parameters do not count."""
        return self.weight if self.is_finite and (self.is_mixed or self.is_active) else 0.0

    @property
    def ranks_with_parameters(self) -> int:
        """Number of ranks whose parameters count."""
        return self.finite_ranks if self.is_mixed else self.active_ranks

    def divisor(self, part: Range) -> int:
        """Number of ranks on which this part of a buffer counts."""
        return self.finite_ranks if self._counts_everywhere(part) else self.active_ranks

    def leave_out(self, buffer: FlatBuffer) -> list[tuple[Array, Array]]:
        """Set the elements that do not count on this rank to zero.

        Returns:
            Views of these elements, each with a copy of its former values.
        """
        if self.is_active and self.is_finite:
            return []
        left_out = []
        for part in buffer.layout.ranges:
            if not (self.is_finite and self._counts_everywhere(part)):
                elements = buffer.array[part.start : part.stop]
                left_out.append((elements, elements.copy()))
                elements[...] = 0
        return left_out

    def _counts_everywhere(self, part: Range) -> bool:
        return self.is_mixed and part.group is not None


def mean_over_some(reduction: Reduction, buffer: Array, partial_average: PartialAverage) -> None:
    """Replace a buffer by its mean over the active ranks, on all ranks.

    Args:
        reduction: reduction that was planned for the buffer.
        buffer: one-dimensional array.
        partial_average: how this rank takes part in the average.
    """
    if not (partial_average.is_active and partial_average.is_finite):
        array_module(buffer).copyto(buffer, 0)
    store(reduction.reduce_scatter(), buffer[reduction.shard], partial_average.active_ranks)
    reduction.all_gather()
