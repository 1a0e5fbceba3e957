"""Rounds in which the ranks take unequally many steps, so that fast ranks do not wait for slow ones."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import floor, isnan, nan
from typing import Any, ClassVar, Protocol, runtime_checkable

from lentando.comm.agreement import Event
from lentando.comm.checks import check_integer, is_number
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.rules.period import Decision, LastingPeriod, Period, PostLocal, RoundSummary, check_steps

__all__ = ["RoundSeconds", "StepsByRank", "UnequalPeriod", "equalising_steps", "unequal_of"]

NEWEST = 0.5
"""Weight of the newest round in the moving mean of a rank's step time."""
ROUNDING = 1e-9
"""Relative error of a quotient of times that is not an unfinished step."""


@runtime_checkable
class UnequalPeriod(Protocol):
    """A ``Period`` whose rounds may have another number of steps on each rank. All ranks decide for all of them."""

    @property
    def steps_by_rank(self) -> Sequence[int]:
        """Number of inner steps of each rank in the round that begins now."""

    def bind(self, rank: int, size: int) -> None:
        """Set which rank's steps ``steps()`` returns. Called once, before training.

        Args:
            rank: number of this rank.
            size: number of ranks.

        Raises:
            ConfigurationError: if the period is for another number of ranks.
        """


@dataclass
class StepsByRank(LastingPeriod):
    """A given number of inner steps in every round on each rank.

    ``optimizer.report()["equalising_steps"]`` proposes such numbers from what a run has measured. Restrictions are
    those of ``RoundSeconds``, and a checkpoint can be resumed on the same number of ranks only.

    Args:
        steps_by_rank: number of inner steps between exact averages on each rank, each at least 1.

    Raises:
        ConfigurationError: if these are no such numbers, or later, if there is another number of ranks.

    Example:
        >>> period = StepsByRank([12, 12, 12, 4])
        >>> period.bind(rank=3, size=4)
        >>> period.steps()
        4
    """

    steps_by_rank: Sequence[int]

    decides_alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if isinstance(self.steps_by_rank, str) or not isinstance(self.steps_by_rank, Sequence):
            raise ConfigurationError(
                f"steps_by_rank must be a list with a number of inner steps for each rank, got {self.steps_by_rank!r}"
            )
        for rank, steps in enumerate(self.steps_by_rank):
            check_steps(f"steps_by_rank of rank {rank}", steps, 1)
        self._rank = 0

    def bind(self, rank: int, size: int) -> None:
        if len(self.steps_by_rank) != size:
            raise ConfigurationError(
                f"steps_by_rank must have a number for each of the {size} ranks, got {len(self.steps_by_rank)}"
            )
        self._rank = rank

    def steps(self) -> int:
        return int(self.steps_by_rank[self._rank])


@dataclass
class RoundSeconds:
    """Rounds of a given time: fast ranks take more inner steps in a round than slow ones, and none waits for another.

    This is the schedule of A-EDiT (Cheng et al., ICLR 2025, arXiv 2412.07210). No step needs a message: the control
    message at the end of a round carries how long a step took on each rank, and all ranks derive from it how many steps
    of each rank fit into the next round,

        steps of rank i = floor(max(seconds, max_j Y_j) / Y_i)

    with Y_i the moving mean of its step time, without communication. A round is at least as long as a step of the
    slowest rank. Inner steps are counted, in reports and for schedules, by the rank that takes most of them, as inside
    ``join``; ``rounds`` is what all ranks have in common: let the training loop run until a number of rounds.

    Prefer ``weighting="normalized"``: every gradient counts the same, and a round moves as far as a fast rank alone.
    With "equal", slow ranks hold the average back; with "steps", less. Only local steps can be unequally many:
    gradients and gossip are exchanged at each step. Delay, fragments, blend and elastic jobs are refused.

    Args:
        seconds: time of computing in each round, > 0.
        initial_steps: inner steps of all ranks in the first round, at least 2, because the first step is not measured.
        measured_rounds: number of rounds that are measured. From then on the numbers of steps stay, so that a run that
            is resumed from a checkpoint is bit-identical. None follows the speed of the ranks all the time.

    Raises:
        ConfigurationError: if a value is out of its range.

    Example:
        >>> import numpy as np
        >>> period = RoundSeconds(1.2)
        >>> period.bind(rank=1, size=2)
        >>> period.steps()
        4
        >>> period.receive(Event.ROUND, {"latest_compute_seconds": np.array([0.1, 0.3])})
        >>> _ = period.update(RoundSummary(1, step=4, loss=1.0, learning_rate=0.1, clock=1.2))
        >>> period.steps(), period.steps_by_rank
        (4, [12, 4])
    """

    seconds: float
    initial_steps: int = 4
    measured_rounds: int | None = None

    decides_alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not (is_number(self.seconds) and self.seconds > 0):
            raise ConfigurationError(f"seconds of RoundSeconds must be a number > 0, got {self.seconds!r}")
        check_integer("initial_steps", self.initial_steps, 2, "inner steps of the first round")
        if self.measured_rounds is not None:
            check_integer("measured_rounds", self.measured_rounds, 1, "rounds")
        self._measured = 0
        self.bind(0, 1)

    @property
    def steps_by_rank(self) -> list[int]:
        """Number of inner steps of each rank in the round that begins now."""
        return list(self._steps_by_rank)

    def bind(self, rank: int, size: int) -> None:
        self._rank = rank
        self._steps_by_rank = [self.initial_steps] * size
        self._step_seconds = [nan] * size

    def steps(self) -> int:
        return self._steps_by_rank[self._rank]

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach nothing: the replica attaches the times of all ranks anyway."""
        return {}

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Note how long a step took on each rank in the round that ends."""
        if event is not Event.ROUND or self._measured == self.measured_rounds:
            return
        latest = by_rank["latest_compute_seconds"].tolist()
        self._step_seconds = [_moved(*pair) for pair in zip(self._step_seconds, latest, strict=True)]
        self._measured += not all(map(isnan, self._step_seconds))  # the very first step is not measured

    def update(self, summary: RoundSummary) -> Decision | None:
        known = [seconds for seconds in self._step_seconds if not isnan(seconds)]
        if not known:
            return None
        longest = max(self.seconds, *known)
        steps_by_rank = [  # a rank that has hardly any batches (inside ``join``) has not been measured
            floor(longest / seconds * (1 + ROUNDING)) if seconds > 0 else self.initial_steps
            for seconds in self._step_seconds
        ]
        if steps_by_rank == self._steps_by_rank:
            return None
        self._steps_by_rank = steps_by_rank
        return Decision(summary.round, summary.step, summary.clock, summary.loss, summary.learning_rate, self.steps())

    def state_dict(self) -> dict[str, Any]:
        return {"measured": self._measured, "step_seconds": self._step_seconds, "steps_by_rank": self._steps_by_rank}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a saved state; with another number of ranks, measuring begins again."""
        if len(state["steps_by_rank"]) == len(self._steps_by_rank):
            self._measured = state["measured"]
            self._step_seconds, self._steps_by_rank = list(state["step_seconds"]), list(state["steps_by_rank"])


def equalising_steps(step_seconds: Sequence[float], total: int) -> list[int]:
    """Steps of each rank with which a round of about as many steps in total ends on all ranks at the same time.

    Args:
        step_seconds: mean time of a step on each rank, > 0.
        total: sum of the steps of all ranks.

    Example:
        >>> equalising_steps([0.1, 0.1, 0.1, 0.3], total=40)
        [12, 12, 12, 4]
    """
    seconds = total / sum(1 / each for each in step_seconds)
    return [max(1, round(seconds / each)) for each in step_seconds]


def unequal_of(period: Period | None) -> UnequalPeriod | None:
    """The schedule, or the one that follows a ``PostLocal``, if its rounds may be unequal; else None."""
    while isinstance(period, PostLocal):
        period = period.following
    return period if isinstance(period, UnequalPeriod) else None


def _moved(mean: float, latest: float) -> float:
    """A moving mean after another value, either of which may be NaN for not known."""
    if isnan(mean) or isnan(latest):
        return latest if isnan(mean) else mean
    return mean + NEWEST * (latest - mean)
