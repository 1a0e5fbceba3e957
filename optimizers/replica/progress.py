"""How far a replica is: in training, in its round, and in its own batches."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from lentando.optimizers.rules.movement_penalty import NormHistory
from lentando.optimizers.rules.period import Decision, Period

__all__ = ["Progress"]


@dataclass
class Progress:
    """How far a replica is: in training, in its round, and in its own batches.

    Args:
        clock: returns the time in seconds.
        period: schedule of the outer steps; None if there are none.
        has_unequal_rounds: whether the ranks may take unequally many steps in a round, by the period.

    Attributes:
        inner_steps: optimizer steps taken; on uneven data, by the rank that took most of them in each round.
        rounds: outer steps taken.
        decisions: decisions of the period, oldest first.
        has_started: whether the very first step has begun.
        is_in_step: whether a step has begun that has not been taken yet.
        is_joined: whether the ranks may have unequal numbers of batches.
        has_ended: whether this rank has run out of batches, and takes part in the steps of the other ranks.
        steps: steps of this round.
        steps_along: those of them that were taken along with other ranks, without a batch.
        steps_in_round: length of this round in steps; None if there are no outer steps.
        due: number of steps of this round after which an outer step, or a part of one, is due; None if there are none.
        rate_sums: sums of the learning rates of the round's steps, one per parameter group.
        latest_rates: learning rates of the step that was counted last, or the mean of the steps that were counted last
            together, one per parameter group; empty before the first step.
        loss_sum: sum of the round's losses; may be a framework's scalar, which is not waited for.
        loss_count: number of losses in ``loss_sum``.
        samples: sum of the samples of the round's steps.
        steps_with_samples: number of the round's steps whose samples are known.
        norms: norms of the movements of all ranks in former rounds.
    """

    clock: Callable[[], float]
    period: Period | None = None
    has_unequal_rounds: bool = False
    inner_steps: int = 0
    rounds: int = 0
    decisions: list[Decision] = field(default_factory=list)
    has_started: bool = False
    is_in_step: bool = False
    is_joined: bool = False
    has_ended: bool = False
    steps: int = 0
    steps_along: int = 0
    steps_in_round: int | None = None
    due: int | None = None
    rate_sums: list[float] = field(default_factory=list)
    latest_rates: Sequence[float] = ()
    loss_sum: Any = 0.0
    loss_count: int = 0
    samples: float = 0.0
    steps_with_samples: int = 0
    norms: NormHistory = field(default_factory=lambda: NormHistory(1))

    def __post_init__(self) -> None:
        self.start_clock()

    def start_clock(self, seconds: float = 0.0) -> None:
        """Set the time since the first step.

        Args:
            seconds: time that has passed already.
        """
        self._clock_origin = self.clock() - seconds

    def seconds(self) -> float:
        """Return the seconds since the first step; a run that is resumed continues where it was saved."""
        return self.clock() - self._clock_origin

    def begin_round(self, groups: int) -> None:
        """Begin a round, of which no step has been taken.

        Args:
            groups: number of parameter groups.
        """
        self.steps = 0
        self.steps_along = 0
        self.samples = 0.0
        self.steps_with_samples = 0
        self.steps_in_round = self.due = None if self.period is None else self.period.steps()
        self.rate_sums = [0.0] * groups

    def for_earlier_groups(self, steps: int, rate_sums: Sequence[float]) -> list[float]:
        """Adapt sums of learning rates to groups that were added or removed during a round.

        The buffers follow such a change only at the end of the round. A new group counts as if it had had its rate from
        the start of the round; a removed one keeps its mean.

        Args:
            steps: number of steps whose learning rates were added up.
            rate_sums: the sums, one for each of the present parameter groups.
        """
        known = len(self.rate_sums)
        for total in rate_sums[known:]:
            self.rate_sums.append(total / steps * self.steps)
        gone = [total / max(self.steps, 1) * steps for total in self.rate_sums[len(rate_sums) :]]
        return [*rate_sums, *gone]

    def mean_rates(self) -> list[float]:
        """Return the mean learning rates of the round so far, one per parameter group."""
        return [total / max(self.steps, 1) for total in self.rate_sums]

    def forget_losses(self) -> None:
        """Drop the losses of the round, which an outer step has used."""
        self.loss_sum, self.loss_count = 0.0, 0
