"""Uneven data: averages over some of the ranks, while those that have run out of batches only adopt them.

PyTorch's ``torch.distributed.algorithms.join`` does so for synchronous training; here it is part of every method.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Protocol, TypeAlias, runtime_checkable

from lentando.comm.array_module import array_module
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatBuffer, Range
from lentando.comm.reductions.reduction import Reduction, store
from lentando.comm.transport import Array

__all__ = ["Joinable", "PartialAverage", "StepAlong", "join", "mean_over_some"]

StepAlong: TypeAlias = Callable[[Sequence[float], bool], bool]
"""Lets the base optimizer of a rank that has no batch step along the others' gradients.

It is given their learning rates, by parameter group, and whether their gradients overflowed; it tells whether that was
an inner step.
"""


@dataclass(frozen=True)
class PartialAverage:
    """What a rank has in an average that is not over all ranks.

    Attributes:
        is_active: whether this rank's numbers count.
        active_ranks: number of ranks whose numbers count.
        finite_ranks: number of ranks whose values are finite.
        is_mixed: parameters count on all ranks: gossip has carried the active ranks' share of them to the others, and
            only the sum over all is what training has found. Statistics do not travel by gossip.
        is_finite: false if nothing of this rank counts, because it is not finite.
        is_over_debiased: whether the average is over de-biased parameters z (push-sum), because those of some rank are
            missing, and not over the biased x.
    """

    is_active: bool
    active_ranks: int
    finite_ranks: int
    is_mixed: bool = False
    is_finite: bool = True
    is_over_debiased: bool = False

    def divisor(self, part: Range) -> int:
        """On how many ranks this part of a buffer counts."""
        return self.finite_ranks if self._counts_everywhere(part) else self.active_ranks

    def leave_out(self, buffer: FlatBuffer) -> list[tuple[Array, Array]]:
        """Put zeros where this rank's numbers do not count. Returns these parts, and copies of what was there."""
        if self.is_active and self.is_finite:
            return []
        left_out = []
        for part in buffer.layout.ranges:
            if not (self.is_finite and self._counts_everywhere(part)):
                own = buffer.array[part.start : part.stop]
                left_out.append((own, own.copy()))
                own[...] = 0
        return left_out

    def _counts_everywhere(self, part: Range) -> bool:
        return self.is_mixed and part.group is not None


def mean_over_some(reduction: Reduction, buffer: Array, partial_average: PartialAverage) -> None:
    """Replace ``buffer``, which ``reduction`` was planned for, by its mean over the active ranks, on all ranks."""
    if not (partial_average.is_active and partial_average.is_finite):
        array_module(buffer).copyto(buffer, 0)
    store(reduction.reduce_scatter(), buffer[reduction.shard], partial_average.active_ranks)
    reduction.all_gather()


@runtime_checkable
class Joinable(Protocol):
    """An optimizer whose ranks may have unequal numbers of batches."""

    def joined(self) -> AbstractContextManager[None]:
        """See ``join``."""


def join(optimizer: Joinable) -> AbstractContextManager[None]:
    """Train on uneven data: put the loop over batches inside this block, on every rank.

    A rank that runs out of batches leaves its loop, and waits at the end of the block until all have. Meanwhile it
    takes part in what the others do, with weight 0: averages are over the ranks that have taken steps, and it adopts
    them. The steps of its last, incomplete round count. When the last rank has no batch left, a round that has begun
    is closed by an exact average, and what gossip has under way is brought home: without gossip, all ranks leave with
    the same parameters. An exception leaves the block at once.

    As long as no rank has run out, nothing differs from training without, but for one control message per gossip step.

    Inside the block only the optimizer's steps may communicate: evaluate, save and load outside. A learning rate that
    changes within the block is that of the ranks which take steps; schedules that count steps should count rounds or
    epochs instead, or they fall behind where there are fewer batches.

    Args:
        optimizer: a ``DistributedOptimizer``.

    Raises:
        ConfigurationError: for another optimizer, inside such a block, or if the method has nothing to wait for
            (local steps with ``exact_average=False``).
        MismatchError: on every rank, if others train without this block.
    """
    if not isinstance(optimizer, Joinable):
        raise ConfigurationError(f"join needs a DistributedOptimizer, got {type(optimizer).__name__}")
    return optimizer.joined()
