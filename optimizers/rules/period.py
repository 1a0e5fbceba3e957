"""When replicas average: the communication period, fixed or changing with the rounds."""

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias, runtime_checkable

from lentando.comm.checks import check_integer
from lentando.comm.errors import ConfigurationError

__all__ = [
    "Decision",
    "FixedPeriod",
    "Period",
    "PeriodSetting",
    "PostLocal",
    "RoundSummary",
    "as_period",
    "check_steps",
    "needs_loss",
]


@dataclass(frozen=True)
class RoundSummary:
    """What every rank knows, equally, at the end of a round.

    Attributes:
        round: rounds completed, this one included.
        step: inner steps completed.
        loss: mean training loss over ranks and the steps of the round; NaN unless ``step(loss=...)`` was given it,
            infinite if it was not a number on some rank.
        learning_rate: mean over ranks, parameter groups and the steps of the round; NaN if a group has none.
        clock: seconds since the first step by rank 0's clock. Goes on where it was when a run is resumed.
    """

    round: int
    step: int
    loss: float
    learning_rate: float
    clock: float


@dataclass(frozen=True)
class Decision:
    """What a schedule decided at the end of a round, and from what.

    Attributes:
        round: rounds completed.
        step: inner steps completed.
        clock: seconds since the first step, as in ``RoundSummary``.
        loss: training loss that decided.
        learning_rate: learning rate that decided.
        period: inner steps of the rounds from now on.
    """

    round: int
    step: int
    clock: float
    loss: float
    learning_rate: float
    period: int


@runtime_checkable
class Period(Protocol):
    """A communication period that may change from round to round.

    It must decide by what it is told alone, so that all ranks decide alike. The replica works on a copy.

    One that decides by the loss says so by an attribute ``needs_loss = True``: then a step without ``loss=`` is an
    error. One that decides by the learning rate says ``needs_learning_rate = True``: then a base optimizer without one
    is an error.
    """

    def steps(self) -> int:
        """Inner steps of the round that begins now, at least 1."""

    def update(self, summary: RoundSummary) -> Decision | None:
        """Called at the end of each round, before ``steps`` is asked again.

        Returns:
            what was decided, for the log and the optimizer's report; None if there was nothing to decide.
        """

    def state_dict(self) -> dict[str, Any]:
        """All that decides future periods, as numbers, strings, lists and dicts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an earlier run."""


PeriodSetting: TypeAlias = "int | Period | None"


@dataclass(frozen=True)
class FixedPeriod:
    """The same number of inner steps in every round.

    Args:
        period: inner steps between exact averages, at least 1 (tau in the papers).
    """

    period: int

    def __post_init__(self) -> None:
        check_steps("period", self.period, 1)

    def describe(self) -> int:
        """What ranks and checkpoints compare: the same as for ``period=12`` in place of ``FixedPeriod(12)``."""
        return int(self.period)

    def steps(self) -> int:
        return int(self.period)

    def update(self, summary: RoundSummary) -> None:
        return

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        return


@dataclass
class PostLocal:
    """Average after every step at first, and by another period from then on: post-local SGD.

    Early steps, at a large learning rate, profit most from agreement (Lin et al., "Don't Use Large Mini-Batches, Use
    Local SGD", ICLR 2020); there ``start`` is the step of the first learning-rate decay.

    Args:
        start: inner steps with an average after each.
        period: what follows: a number of steps or another ``Period``.
    """

    start: int
    period: "int | Period"

    def __post_init__(self) -> None:
        check_steps("start of PostLocal", self.start, 0)
        self._then = as_period(self.period)
        self._step = 0

    @property
    def needs_loss(self) -> bool:
        """Whether the period that follows does."""
        return needs_loss(self._then)

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the period that follows does."""
        return bool(getattr(self._then, "needs_learning_rate", False))

    def steps(self) -> int:
        return 1 if self._step < self.start else self._then.steps()

    def update(self, summary: RoundSummary) -> Decision | None:
        # The round that ends at ``start`` is still one of the synchronous steps: the schedule after it starts fresh.
        decision = self._then.update(summary) if self._step >= self.start else None
        self._step = summary.step
        return decision

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "then": self._then.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._then.load_state_dict(state["then"])


def as_period(setting: "int | Period") -> Period:
    """A ``Period`` from what users write.

    Raises:
        ConfigurationError: for anything else than an integer >= 1 or a ``Period``.
    """
    if isinstance(setting, type):
        raise ConfigurationError(f"period must be an integer >= 1 or an object, got the class {setting.__name__}")
    if isinstance(setting, Period):
        return setting
    return FixedPeriod(setting)


def needs_loss(period: Period) -> bool:
    """Whether a schedule decides by the loss; see ``Period``."""
    return bool(getattr(period, "needs_loss", False))


def check_steps(name: str, value: Any, least: int) -> None:
    """A setting that counts inner steps must be an integer.

    Raises:
        ConfigurationError: if it is not, or less than ``least``.
    """
    check_integer(name, value, least, "inner steps")
