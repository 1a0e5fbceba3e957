"""Which settings of a method go together, and what follows from several of them."""

from collections.abc import Mapping
from typing import Literal, TypeAlias, get_args

from lentando.comm.checks import check_choice
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.fragments import Delay, Streaming
from lentando.optimizers.rules.movement_penalty import MovementPenalty, Weighting
from lentando.optimizers.rules.non_finite import OnNonFinite
from lentando.optimizers.rules.outer_rule import OuterRule
from lentando.optimizers.rules.outer_stepping import OuterAlgorithm
from lentando.optimizers.rules.period import FixedPeriod, Period, PeriodSetting, as_period, needs_loss, participant_of
from lentando.optimizers.rules.unequal_period import unequal_of
from lentando.optimizers.rules.wire import WireDtype, check_wire_dtype

__all__ = ["BaseBuffers", "CombinedSettings"]

BaseBuffers: TypeAlias = Literal["reset", "maintain", "average", "auto"]


class CombinedSettings:
    """The part of ``Settings`` that concerns several settings at once. ``Settings`` sets the attributes."""

    base: BaseAlgorithm
    outer: OuterRule | OuterAlgorithm | None
    period: PeriodSetting
    base_buffers: BaseBuffers
    exact_average: bool
    on_nonfinite: OnNonFinite
    delay: Delay
    fragments: int
    blend: float | None
    wire_dtype: WireDtype | None
    weighting: Weighting
    movement_penalty: MovementPenalty | None

    @property
    def streaming(self) -> Streaming:
        """Delay, fragments and blend of outer steps."""
        return Streaming(self.delay, self.fragments, self.blend)

    @property
    def averages_movements(self) -> bool:
        """Whether outer steps average what the ranks have moved since the anchor, not their parameters."""
        return bool(self._given("wire_dtype", "weighting", "movement_penalty"))

    def make_period(self) -> Period | None:
        """The period as a schedule, None if there are no outer steps."""
        return None if self.period is None else as_period(self.period)

    def check_combination(self) -> None:
        """Check that the settings go together.

        Raises:
            ConfigurationError: if some of them do not.
        """
        self._check_movements()
        if self.period is not None:
            period = as_period(self.period)
            if needs_loss(period) and not self.exact_average:
                raise ConfigurationError(
                    f"{self.period!r} decides by the mean loss over all ranks, which is formed with the exact "
                    "average: with exact_average=False every rank would decide by its own loss. Use a fixed period"
                )
            if participant_of(period) is not None and not self.exact_average:
                raise ConfigurationError(
                    f"{self.period!r} decides by what all ranks report, which they exchange before the exact average: "
                    "with exact_average=False they exchange nothing. Use a fixed period"
                )
        elif self.outer is not None:
            raise ConfigurationError("an outer step needs period= (inner steps between outer steps), got None")
        elif not self.base.communicates:
            raise ConfigurationError(
                f"{self.base!r} sends nothing between outer steps: without period= the replicas would never communicate"
            )
        if not self.exact_average and self.outer is None:
            raise ConfigurationError("exact_average=False without an outer rule would make the outer step do nothing")
        if self.streaming.is_needed:
            self._check_streaming()
        if unequal_of(self.make_period()) is not None:
            self._check_unequal()

    def _check_streaming(self) -> None:
        """Refuse what does not go together with delay, fragments and blend."""
        period = self.make_period()
        if isinstance(period, FixedPeriod):
            self.streaming.check_period(period.steps())
        given = ", ".join(self._given("delay", "fragments", "blend"))
        reasons = {
            "without period=, because there are no outer steps": period is None,
            f"over {self.base!r}, whose gossip mixes parameters that have and have not adopted an outer step: use "
            "LocalSGD() or AllReduce()": self.base.mixes_parameters,
            "with exact_average=False, which forms no average": not self.exact_average,
            f"with the outer step {self.outer!r}, which decides itself what is sent and when": isinstance(
                self.outer, OuterAlgorithm
            ),
            "with base_buffers='average', whose average would have to be waited for: use 'maintain'": (
                self.base_buffers == "average"
            ),
            "with base_buffers='reset', which would reset all of the base optimizer with every fragment: use "
            "'maintain'": self.fragments > 1 and self.base_buffers == "reset",
            f"with {self.period!r}, whose rounds have unequal numbers of steps: use delay=0": (
                unequal_of(period) is not None
            ),
            "with weighting or movement_penalty, which need outer steps that wait for the average": bool(
                self._given("weighting", "movement_penalty")
            ),
            "with on_nonfinite='skip', because a rank would continue with values that are not finite until it adopts "
            "the average: use 'raise'": self.on_nonfinite == "skip",
        }
        _refuse(given, reasons)

    def _check_unequal(self) -> None:
        """Refuse what does not go together with rounds in which the ranks take unequally many steps."""
        reasons = {
            f"over {self.base!r}, whose ranks communicate at each step: use LocalSGD()": self.base.communicates,
            "with exact_average=False, where no rank waits for another: give a number of steps": not self.exact_average,
        }
        _refuse(repr(self.period), reasons)

    def _check_movements(self) -> None:
        """Check the settings of averages of movements."""
        check_wire_dtype(self.wire_dtype)
        check_choice("weighting", self.weighting, get_args(Weighting))
        if self.movement_penalty is not None and not isinstance(self.movement_penalty, MovementPenalty):
            raise ConfigurationError(
                f"movement_penalty must be MovementPenalty(...) or None, got {self.movement_penalty!r}"
            )
        given = self._given("wire_dtype", "weighting", "movement_penalty")
        if not given:
            return
        if self.period is None:
            raise ConfigurationError(
                f"{given[0]} is about the average of outer steps, and period=None takes none: give a period, or, for "
                "averages of gradients and gossip, AllReduce(wire_dtype=...) or SGP(wire_dtype=...) as base"
            )
        if not self.exact_average:
            raise ConfigurationError(f"{given[0]} is about the exact average, which exact_average=False does not form")
        if isinstance(self.outer, OuterAlgorithm):
            raise ConfigurationError(
                f"{given[0]} is not possible with {self.outer!r}, which decides itself what it sends"
            )
        weights = self._given("weighting", "movement_penalty")
        if self.base.mixes_parameters and weights:
            raise ConfigurationError(
                f"{weights[-1]} is not possible with {self.base!r}: gossip has mixed the movements of the ranks before "
                "the average, so that none is that of one rank"
            )

    def _given(self, *names: str) -> list[str]:
        """Those of these settings that are not the defaults, as text."""
        return [f"{name}={value!r}" for name in names if (value := getattr(self, name)) != getattr(type(self), name)]


def _refuse(given: str, reasons: Mapping[str, bool]) -> None:
    """Raise a ConfigurationError with the first reason that applies, if one does."""
    for reason, is_refused in reasons.items():
        if is_refused:
            raise ConfigurationError(f"{given} is not possible {reason}")
