"""AdaComm's communication period: long while the loss is high, and shorter as it falls."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import ceil, inf, isclose, isfinite, isnan, nan, sqrt
from typing import Any, ClassVar, Literal

from lentando.comm.agreement import Event
from lentando.comm.checks import check_flag, is_number
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.loss_argument import as_number
from lentando.optimizers.rules.period import Decision, RoundSummary, check_steps

__all__ = ["AdaptivePeriod"]

ROUNDING = 1e-6
"""Relative difference below which two learning rates count as equal, or a period as the integer below it."""


@dataclass
class AdaptivePeriod:
    r"""A period that follows the training loss (Wang and Joshi, MLSys 2019, arXiv 1810.08313).

    Long rounds need little communication, but have a higher error floor, which matters once the loss is near it.
    Training is therefore divided into intervals, and at the end of each the period becomes

        tau_l = ceil(sqrt((eta_0 / eta_l)^e (F_l - F_inf) / (F_0 - F_inf)) tau_0)

    with F_l the mean training loss over all ranks and steps of the interval, eta_l the learning rate at its end, and
    F_0, eta_0 those of the first round, whose end begins the first interval. If that does not lower the period while
    the learning rate is unchanged, the loss is on a plateau, and the period is halved instead (``refined``).

    The first round is the first with a finite loss and a learning rate above 0. Later rounds whose loss is not finite
    on some rank do not count towards F_l; an interval lasts until it has a round that does. An interval that ends at a
    learning rate of 0 leaves the period as it is.

    With ``by_validation_loss``, F is a loss that the program measures: it calls ``record_validation_loss`` of the
    optimizer's ``schedule`` on every rank, with the loss of that rank's part of the validation data, at the same step,
    for example after each epoch. The mean over the ranks counts from the end of the round in progress. F_0 is the first
    one, and F_l the last one of an interval, which lasts until it has one.

    The paper decays the learning rate only once the period is 1, from a low floor. To do the same, step the scheduler
    only while ``optimizer.period``, which is equal on all ranks, is 1.

    Args:
        initial_period: tau_0, number of inner steps. The paper searches for the longest with which the loss still falls
            fast at first.
        interval_seconds: length of an interval in seconds of rank 0's clock; ``math.inf`` keeps the initial period.
        interval_steps: length of an interval in inner steps, in place of ``interval_seconds``, so that runs can be
            repeated exactly.
        refined: whether the period is halved on a plateau.
        learning_rate_exponent: exponent e. The theory's 3 multiplies the period by 31 where the learning rate drops by
            10; the paper uses 1, which multiplies it by 3.
        loss_floor: F_inf, the least loss that can be reached.
        min_period: shortest period, in inner steps.
        max_period: longest period, in inner steps; None for no limit.
        by_validation_loss: whether the period follows a validation loss in place of the training loss.

    Raises:
        ConfigurationError: if a value is out of its range.

    Example:
        >>> from lentando.optimizers.rules.period import RoundSummary
        >>> period = AdaptivePeriod(initial_period=16, interval_steps=16)
        >>> period.update(RoundSummary(1, 16, loss=4.0, learning_rate=0.1, clock=2.0))
        >>> period.update(RoundSummary(2, 32, loss=1.0, learning_rate=0.1, clock=4.0)).period
        8
        >>> period.steps()
        8
    """

    initial_period: int = 16
    interval_seconds: float = 60.0
    interval_steps: int | None = None
    refined: bool = True
    learning_rate_exponent: Literal[1, 3] = 1
    loss_floor: float = 0.0
    min_period: int = 1
    max_period: int | None = None
    by_validation_loss: bool = False

    needs_learning_rate: ClassVar[bool] = True
    decides_alike: ClassVar[bool] = True

    def __post_init__(self) -> None:
        check_steps("initial_period", self.initial_period, 1)
        check_steps("min_period", self.min_period, 1)
        if self.max_period is not None:
            check_steps("max_period", self.max_period, 1)
        if self.interval_steps is not None:
            check_steps("interval_steps", self.interval_steps, 1)
        if self._within_limits(self.initial_period) != self.initial_period:
            raise ConfigurationError(
                f"initial_period must be from min_period={self.min_period} to max_period={self.max_period}, "
                f"got {self.initial_period}"
            )
        if not (is_number(self.interval_seconds) or self.interval_seconds == inf) or self.interval_seconds <= 0:
            raise ConfigurationError(f"interval_seconds must be > 0, got {self.interval_seconds!r}")
        check_flag("refined", self.refined)
        check_flag("by_validation_loss", self.by_validation_loss)
        if self.learning_rate_exponent not in (1, 3):
            raise ConfigurationError(f"learning_rate_exponent must be 1 or 3, got {self.learning_rate_exponent!r}")
        if not is_number(self.loss_floor):
            raise ConfigurationError(f"loss_floor must be a finite number, got {self.loss_floor!r}")
        self._now = _Progress(self.initial_period)
        self._validated = nan  # mean over ranks, from the control message of this round

    @property
    def needs_loss(self) -> bool:
        """Whether every step needs its training loss."""
        return not self.by_validation_loss

    def record_validation_loss(self, loss: float) -> None:
        """Record a validation loss of this rank, which counts from the end of the round in progress.

        Every rank calls this at the same step, or only some of them, whose mean then counts. A later call in the same
        round replaces the value.

        Args:
            loss: mean loss over this rank's part of the validation data; a number.

        Raises:
            ConfigurationError: without ``by_validation_loss``, or for anything else than a number.
        """
        if not self.by_validation_loss:
            raise ConfigurationError(
                "this AdaptivePeriod follows the training loss: give by_validation_loss=True to use a validation loss"
            )
        value = as_number(loss)
        self._now.recorded_loss = value if isfinite(value) else inf

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach the validation loss that this rank has recorded since the last outer step, NaN if it has none."""
        if not self.by_validation_loss:
            return {}
        recorded = self._now.recorded_loss
        return {"validation_loss": nan if recorded is None else recorded}

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Take the mean of the validation losses of all ranks, before an outer step."""
        if self.by_validation_loss and event is Event.ROUND:
            losses = [loss for loss in by_rank["validation_loss"].tolist() if not isnan(loss)]
            self._validated = sum(losses) / len(losses) if losses else nan

    def steps(self) -> int:
        return self._now.period

    def update(self, summary: RoundSummary) -> Decision | None:
        """As ``Period.update``.

        Raises:
            ConfigurationError: if the first round's loss is not above ``loss_floor``.
        """
        if self.by_validation_loss:
            summary, self._now.recorded_loss = replace(summary, loss=self._validated), None
        now, place, length = self._now, summary.clock, self.interval_seconds
        if self.interval_steps is not None:
            place, length = summary.step, self.interval_steps
        if now.first_rate == 0:
            if isfinite(summary.loss) and summary.learning_rate > 0:
                self._begin(summary, place)
            return None
        if isfinite(summary.loss) and self.by_validation_loss:
            now.loss_sum, now.loss_steps = summary.loss, 1
        elif isfinite(summary.loss):
            now.loss_sum += summary.loss * now.period
            now.loss_steps += now.period
        if place - now.interval_start < length or not now.loss_steps:
            return None
        loss = now.loss_sum / now.loss_steps
        now.loss_sum, now.loss_steps = 0.0, 0
        now.interval_start += (place - now.interval_start) // length * length
        if summary.learning_rate > 0:
            now.period = self._next_period(loss, summary.learning_rate)
            now.last_rate = summary.learning_rate
        return Decision(summary.round, summary.step, summary.clock, loss, summary.learning_rate, now.period)

    def state_dict(self) -> dict[str, Any]:
        state = asdict(self._now)
        if not self.by_validation_loss:
            del state["recorded_loss"]
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._now = _Progress(**state)

    def _begin(self, summary: RoundSummary, place: float) -> None:
        if summary.loss <= self.loss_floor:
            raise ConfigurationError(
                f"AdaComm needs a {'validation' if self.by_validation_loss else 'training'} loss above loss_floor="
                f"{self.loss_floor:g}, but the first round's mean loss is {summary.loss:g} already. Set loss_floor to "
                "an estimate of the least loss that can be reached"
            )
        self._now.first_loss = summary.loss
        self._now.first_rate = self._now.last_rate = summary.learning_rate
        self._now.interval_start = place

    def _next_period(self, loss: float, rate: float) -> int:
        now = self._now
        # A mean of equal learning rates differs from them in the last bits, and from round to round.
        still = isclose(rate, now.last_rate, rel_tol=ROUNDING)
        slower = 1.0 if isclose(rate, now.first_rate, rel_tol=ROUNDING) else now.first_rate / rate
        left = max(0.0, loss - self.loss_floor) / (now.first_loss - self.loss_floor)
        factor = sqrt(slower**self.learning_rate_exponent * left)
        by_loss = self._within_limits(ceil(factor * self.initial_period * (1 - ROUNDING)))
        if self.refined and still and by_loss >= now.period:
            return self._within_limits(now.period // 2)
        return by_loss

    def _within_limits(self, period: int) -> int:
        period = max(period, self.min_period)
        return period if self.max_period is None else min(period, self.max_period)


@dataclass
class _Progress:
    """State of an ``AdaptivePeriod`` that changes during training."""

    period: int
    first_loss: float = 0.0
    first_rate: float = 0.0  # 0 until the first round has ended
    last_rate: float = 0.0  # at the last decision
    interval_start: float = 0.0  # seconds or steps
    loss_sum: float = 0.0
    loss_steps: int = 0
    recorded_loss: float | None = None  # of this rank's validation, since the last outer step
