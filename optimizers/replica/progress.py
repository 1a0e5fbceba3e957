"""How far a replica is: the counts that everything else goes by."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lentando.optimizers.rules.non_finite import told_loss

__all__ = ["Progress"]


@dataclass
class Progress:
    """How far a replica is: in training, in its round, and in its own batches.

    Args:
        clock: that its seconds are counted by.

    Attributes:
        inner_steps: optimizer steps taken; on uneven data, by the rank that took most of them in each round.
        rounds: outer steps taken.
        has_started: whether the very first step has begun.
        is_in_step: whether a step has begun, and is not taken yet.
        is_joined: whether the ranks may have unequal numbers of batches.
        has_ended: whether this rank has run out of them, and takes part in what the others do.
        steps: of this round.
        steps_along: of those, taken with the others, without a batch.
        steps_in_round: after which the outer step is due; None if there are no outer steps.
        rate_sums: learning rates of the round's steps, added up, per parameter group.
        latest_rates: learning rates of the step that was counted last, or the mean of the steps that were counted last
            together, per parameter group; empty before the first.
        loss_sum: of the round's losses; may be a framework's scalar, which is not waited for.
        loss_count: how many losses that are.
    """

    clock: Callable[[], float]
    inner_steps: int = 0
    rounds: int = 0
    has_started: bool = False
    is_in_step: bool = False
    is_joined: bool = False
    has_ended: bool = False
    steps: int = 0
    steps_along: int = 0
    steps_in_round: int | None = None
    rate_sums: list[float] = field(default_factory=list)
    latest_rates: Sequence[float] = ()
    loss_sum: Any = 0.0
    loss_count: int = 0

    def __post_init__(self) -> None:
        self.start_clock()

    def start_clock(self, seconds: float = 0.0) -> None:
        """So many seconds are over."""
        self._clock_origin = self.clock() - seconds

    def seconds(self) -> float:
        """Since the first step; goes on where it was when a run is resumed."""
        return self.clock() - self._clock_origin

    def begin_round(self, steps: int | None, groups: int) -> None:
        """No step of it is taken yet.

        Args:
            steps: after which it ends.
            groups: how many parameter groups have a learning rate.
        """
        self.steps = 0
        self.steps_along = 0
        self.steps_in_round = steps
        self.rate_sums = [0.0] * groups

    def count(self, steps: int, rate_sums: Sequence[float]) -> None:
        """So many steps are taken, with learning rates that add up to these."""
        if len(rate_sums) != len(self.rate_sums):
            rate_sums = self._for_groups_of_before(steps, rate_sums)
        self.inner_steps += steps
        self.steps += steps
        self.latest_rates = tuple(rate_sums) if steps == 1 else [total / steps for total in rate_sums]
        sums = self.rate_sums
        for group, rate in enumerate(rate_sums):
            sums[group] += rate

    def _for_groups_of_before(self, steps: int, rate_sums: Sequence[float]) -> list[float]:
        """Groups were added or removed in the middle of a round: the averages follow that at its end.

        A group that is new has had its rate from the start of the round, one that is gone keeps its mean.
        """
        known = len(self.rate_sums)
        for total in rate_sums[known:]:
            self.rate_sums.append(total / steps * self.steps)
        gone = [total / max(self.steps, 1) * steps for total in self.rate_sums[len(rate_sums) :]]
        return [*rate_sums, *gone]

    def is_round_over(self) -> bool:
        """Whether the outer step is due."""
        return self.steps == self.steps_in_round

    def mean_rates(self) -> list[float]:
        """Of the round so far, per parameter group."""
        return [total / max(self.steps, 1) for total in self.rate_sums]

    def mean_loss(self) -> float:
        """Of the round so far, as a control message carries it."""
        return told_loss(float(self.loss_sum) / self.loss_count if self.loss_count else None)

    def forget_losses(self) -> None:
        """They have been told."""
        self.loss_sum, self.loss_count = 0.0, 0
