"""The communication period: how many inner steps there are between exact averages, fixed or by a schedule."""

from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, TypeAlias, runtime_checkable

from lentando.comm.agreement import Participant
from lentando.comm.checks import check_integer
from lentando.comm.errors import ConfigurationError

__all__ = [
    "Decision",
    "FixedPeriod",
    "LastingPeriod",
    "Period",
    "PeriodSetting",
    "PostLocal",
    "RoundSummary",
    "as_period",
    "check_steps",
    "decides_alike",
    "needs_loss",
    "participant_of",
]


@dataclass(frozen=True)
class RoundSummary:
    """Facts about a round that has ended, equal on all ranks.

    Attributes:
        round: number of rounds completed, this one included.
        step: number of inner steps completed.
        loss: mean training loss over ranks and the steps of the round; NaN unless it was passed to ``step(loss=...)``,
            infinite if it was NaN on some rank.
        learning_rate: mean over ranks, parameter groups and the steps of the round; NaN if a group has none.
        clock: seconds since the first step by rank 0's clock; a resumed run continues the count of the saved one.
    """

    round: int
    step: int
    loss: float
    learning_rate: float
    clock: float


@dataclass(frozen=True)
class Decision:
    """A schedule's decision at the end of a round, with the values on which it is based.

    Attributes:
        round: number of rounds completed.
        step: number of inner steps completed.
        clock: seconds since the first step, as in ``RoundSummary``.
        loss: loss on which the decision is based.
        learning_rate: learning rate on which the decision is based.
        period: number of inner steps per round from now on.
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

    Its decisions may depend on the summaries of rounds only, so that all ranks decide alike. The replica uses a copy,
    which ``DistributedOptimizer.schedule`` returns.

    A period that needs other numbers of all ranks also has the methods of ``lentando.comm.agreement.Participant``: what
    its ``contribute`` returns travels in every control message, and its ``receive`` gets the numbers of all ranks,
    before ``update`` is called.

    Ranks and checkpoints compare periods as data (``lentando.optimizers.rules.describe``): by fields of dataclasses,
    otherwise by the attributes at the time when the optimizer is created, or by what a method ``describe()`` returns.

    A period that depends on the loss has an attribute ``needs_loss = True``: then a step without ``loss=`` is an error.
    A period that depends on the learning rate has ``needs_learning_rate = True``: then a base optimizer without one is
    an error.

    At the beginning of each round the ranks compare what ``steps()`` has returned, so that a difference is an error on
    every rank. This takes a control message. A class that has an attribute ``decides_alike = True`` of its own, because
    its decisions cannot differ, saves it.
    """

    def steps(self) -> int:
        """Number of inner steps of the round that begins now, at least 1."""

    def update(self, summary: RoundSummary) -> Decision | None:
        """Take note of a round that has ended; called before the next call of ``steps``.

        Returns:
            The decision, for the log and the optimizer's report; None if there was nothing to decide.
        """

    def state_dict(self) -> dict[str, Any]:
        """Everything on which future periods depend, as numbers, strings, lists and dicts."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()`` of an earlier run."""


PeriodSetting: TypeAlias = int | Period | None


class LastingPeriod:
    """The methods of a period whose rounds always have the same lengths."""

    def update(self, summary: RoundSummary) -> None:
        """Take no note of a round: there is nothing to decide."""

    def state_dict(self) -> dict[str, Any]:
        """An empty dict: no future period depends on what has happened."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue as always: there is no state to load."""


@dataclass(frozen=True)
class FixedPeriod(LastingPeriod):
    """The same number of inner steps in every round.

    Args:
        period: number of inner steps between exact averages, at least 1 (tau in the papers).

    Example:
        >>> FixedPeriod(12).steps()
        12
    """

    period: int

    decides_alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps("period", self.period, 1)

    def describe(self) -> int:
        """What ranks and checkpoints compare: the same as for ``period=12`` in place of ``FixedPeriod(12)``."""
        return int(self.period)

    def steps(self) -> int:
        return int(self.period)


@dataclass
class PostLocal:
    """Post-local SGD: average after every step at first, and with another period from then on.

    The early steps, at a large learning rate, profit most from equal replicas (Lin et al., "Don't Use Large
    Mini-Batches, Use Local SGD", ICLR 2020). In that paper, ``start`` is the step of the first learning-rate decay.

    Args:
        start: number of inner steps with an average after each.
        period: the period that follows: a number of inner steps, or another ``Period``.

    Example:
        >>> period = PostLocal(2, 8)
        >>> lengths, step = [], 0
        >>> for number in range(1, 5):
        ...     lengths.append(period.steps())
        ...     step += period.steps()
        ...     period.update(RoundSummary(number, step, loss=1.0, learning_rate=0.1, clock=0.0))
        >>> lengths
        [1, 1, 8, 8]
    """

    start: int
    period: "int | Period"

    def __post_init__(self) -> None:
        check_steps("start of PostLocal", self.start, 0)
        self._then = as_period(self.period)
        self._step = 0

    @property
    def following(self) -> Period:
        """The period that follows the first steps, as it is now."""
        return self._then

    @property
    def decides_alike(self) -> bool:
        """Whether the decisions of the period that follows cannot differ between ranks."""
        return decides_alike(self._then)

    @property
    def needs_loss(self) -> bool:
        """Whether the period that follows needs the loss."""
        return needs_loss(self._then)

    @property
    def needs_learning_rate(self) -> bool:
        """Whether the period that follows needs the learning rate."""
        return bool(getattr(self._then, "needs_learning_rate", False))

    def steps(self) -> int:
        return 1 if self._step < self.start else self._then.steps()

    def update(self, summary: RoundSummary) -> Decision | None:
        # The round that ends at ``start`` is still one of the synchronous steps: the next period begins after it.
        decision = self._then.update(summary) if self._step >= self.start else None
        self._step = summary.step
        return decision

    def state_dict(self) -> dict[str, Any]:
        return {"step": self._step, "then": self._then.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._step = state["step"]
        self._then.load_state_dict(state["then"])


def as_period(setting: "int | Period") -> Period:
    """A ``Period`` from a number of inner steps; a ``Period`` is returned as it is.

    Raises:
        ConfigurationError: if the setting is neither an integer >= 1 nor a ``Period``.
    """
    if isinstance(setting, type):
        raise ConfigurationError(f"period must be an integer >= 1 or an object, got the class {setting.__name__}")
    if isinstance(setting, Period):
        return setting
    return FixedPeriod(setting)


def needs_loss(period: Period) -> bool:
    """Whether a schedule depends on the loss (its attribute ``needs_loss``)."""
    return bool(getattr(period, "needs_loss", False))


def decides_alike(period: Period) -> bool:
    """Whether the decisions of a schedule cannot differ between ranks. A class does not inherit that it is so."""
    return "decides_alike" in vars(type(period)) and bool(getattr(period, "decides_alike", False))


def participant_of(period: Period) -> Participant | None:
    """The schedule, or the one that follows a ``PostLocal``, if it takes part in control messages; else None."""
    while isinstance(period, PostLocal):
        period = period.following
    return period if isinstance(period, Participant) else None


def check_steps(name: str, value: Any, least: int) -> None:
    """Refuse a number of inner steps that is not an integer.

    Args:
        name: name of the setting.
        value: value of the setting.
        least: smallest number that is allowed.

    Raises:
        ConfigurationError: if the value is no integer, or less than ``least``.
    """
    check_integer(name, value, least, "inner steps")
