"""The four independent choices that make up a method, checked once, for all frameworks alike.

Base optimizer, base algorithm, outer step and communication period; every method in the papers is one setting of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import isnan
from typing import Any, Literal, TypeAlias, get_args

from lentando.comm.checks import check_choice, check_flag, check_has
from lentando.comm.collectives import Algorithm
from lentando.comm.errors import ConfigurationError, MismatchError, grouped_by_rank
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.describe import as_text, describe, differences, with_defaults
from lentando.optimizers.rules.non_finite import OnNonFinite
from lentando.optimizers.rules.outer_rule import OuterRule
from lentando.optimizers.rules.period import Period, PeriodSetting, as_period, needs_loss

__all__ = ["DESCRIPTION_VERSION", "BaseBuffers", "Settings", "check_same_settings", "different_from"]

DESCRIPTION_VERSION = 1
"""Of ``Settings.description``. A field that is added with a default that changes nothing needs no new version."""

CHANGEABLE = ("on_nonfinite", "rates_may_differ")
"""Settings that another run may change."""

BASE_ALGORITHM = ("averages_gradients", "communicates", "mixes_parameters", "bind")
"""What every base algorithm has."""

BaseBuffers: TypeAlias = Literal["reset", "maintain", "average", "auto"]


@dataclass(frozen=True)
class Settings:
    """How replicas train together.

    Args:
        base: base algorithm, that is, how replicas communicate at each inner step: ``AllReduce()``, ``LocalSGD()``,
            ``SGP()``, ``OSGP()`` or ``DPSGD()``.
        outer: outer rule that each outer step applies to the exact average: ``SlowMomentum(...)`` or ``OuterSGD(...)``;
            None adopts the average.
        period: inner steps between two outer steps, or a ``Period``; None for no outer steps.
        base_buffers: what an outer step does to the base optimizer's state: "reset" makes it that of a new optimizer,
            "maintain" leaves it, "average" averages its buffers over the ranks. "auto" is the choice of SlowMo's
            authors: "maintain" for optimizers that divide by a running mean of squared gradients, which would have to
            be learned again (Adam, RMSprop, ...; recognized by a hyperparameter whose name begins with "eps"), and
            "reset" for others (SGD, ...). It is "average" for optimizers that keep a moving average of the weights
            (Keras's ``use_ema=True``).
        exact_average: whether an outer step begins with the exact average. If False, each replica applies the outer
            rule to its own parameters.
        algorithm: how the exact average is formed: "ring"; "engine", the backend's own all-reduce; "auto", which
            chooses by size; or "measured", which compares all implementations once in a job, so that the result of
            another start of the job may be rounded differently.
        on_nonfinite: what happens if parameters, gradients or the loss of a rank are not finite when the ranks
            communicate: "raise" raises an error on every rank, which names that rank; "skip" leaves its values out of
            the average, which that rank then adopts, with a new base optimizer.
        rates_may_differ: whether the learning rates of the ranks differ on purpose. Otherwise a difference is an error
            at construction and one warning later, as soon as the ranks exchange messages that show it: with every
            average of gradients and every outer step, but not with gossip alone.

    Raises:
        ConfigurationError: for values that cannot work.
    """

    base: BaseAlgorithm = AllReduce()
    outer: OuterRule | None = None
    period: PeriodSetting = None
    base_buffers: BaseBuffers = "maintain"
    exact_average: bool = True
    algorithm: Algorithm = "auto"
    on_nonfinite: OnNonFinite = "raise"
    rates_may_differ: bool = False

    def __post_init__(self) -> None:
        check_has("base", self.base, BASE_ALGORITHM, "AllReduce(), LocalSGD(), SGP()")
        if self.outer is not None:
            check_has("outer", self.outer, ("step", "keeps_momentum"), "SlowMomentum(), OuterSGD()")
        check_choice("on_nonfinite", self.on_nonfinite, get_args(OnNonFinite))
        if self.on_nonfinite == "skip" and not self.exact_average:
            raise ConfigurationError(
                "on_nonfinite='skip' restores a rank from the average of the others, and exact_average=False forms none"
            )
        check_choice("base_buffers", self.base_buffers, get_args(BaseBuffers))
        check_choice("algorithm", self.algorithm, get_args(Algorithm))
        check_flag("exact_average", self.exact_average)
        check_flag("rates_may_differ", self.rates_may_differ)
        if self.period is not None:
            if needs_loss(as_period(self.period)) and not self.exact_average:
                raise ConfigurationError(
                    f"{self.period!r} decides by the mean loss over all ranks, which travels with the exact average: "
                    "with exact_average=False every rank would decide by its own. Use a fixed period there"
                )
        elif self.outer is not None:
            raise ConfigurationError("an outer step needs period= (inner steps between outer steps), got None")
        elif not self.base.communicates:
            raise ConfigurationError(
                f"{self.base!r} sends nothing by itself: without period= the replicas would never hear of each other"
            )
        if not self.exact_average and self.outer is None:
            raise ConfigurationError("exact_average=False without an outer rule would make the outer step do nothing")

    @cached_property
    def description(self) -> dict[str, Any]:
        """The settings as data, equal on every rank that has the same; see ``describe``.

        Made when it is first asked for, before training: objects of the user's may change their attributes later.
        """
        own = {field.name: describe(getattr(self, field.name)) for field in fields(self)}
        return {"version": DESCRIPTION_VERSION, **own}

    @property
    def method(self) -> dict[str, Any]:
        """Those that a checkpoint must be continued with, as data."""
        return {key: value for key, value in self.description.items() if key not in CHANGEABLE}

    def for_optimizer(self, description: OptimizerDescription) -> "Settings":
        """With what "auto" stands for where this is the base optimizer."""
        if self.base_buffers != "auto":
            return self
        if description.keeps_average_of_weights:
            return replace(self, base_buffers="average")
        return replace(self, base_buffers="maintain" if description.keeps_second_moments else "reset")

    def check_learning_rates(self, rates: Sequence[float]) -> None:
        """The base optimizer has these, by parameter group; NaN where it has none.

        Raises:
            ConfigurationError: if the method needs one that is not there.
        """
        missing = [number for number, rate in enumerate(rates) if isnan(rate)]
        if not missing:
            return
        found = f"parameter group {missing[0]} of the base optimizer has none (no 'lr', or None)"
        if self.outer is not None and self.outer.needs_learning_rate:
            raise ConfigurationError(
                f"{as_text(describe(self.outer))} needs the learning rate of the steps, and {found}. Use DiLoCo, whose "
                "outer step does not use it, slow_momentum=0, or a base optimizer with a learning rate"
            )
        period = self.make_period()
        if period is not None and getattr(period, "needs_learning_rate", False):
            raise ConfigurationError(
                f"{as_text(describe(period))} follows the learning rate, and {found}. Use a fixed period, or a base "
                "optimizer with a learning rate"
            )

    def make_period(self) -> Period | None:
        """The period as a schedule."""
        return None if self.period is None else as_period(self.period)


def check_same_settings(by_rank: Sequence[dict[str, Any]]) -> None:
    """Compare the settings of all ranks.

    Args:
        by_rank: ``Settings.description`` of each.

    Raises:
        MismatchError: with each setting that differs, its values, and the ranks that have them.
    """
    if found := differences(by_rank):
        listed = "; ".join(f"{key}: {grouped_by_rank(values)}" for key, values in found)
        raise MismatchError(
            f"the settings differ between ranks. {listed}. Give every rank the same. An object of your own is compared "
            "by its attributes, or by what its method describe() returns, if it has one"
        )


def different_from(settings: Settings, saved: Mapping[str, Any]) -> str:
    """The settings in which a saved run differs, with both values, for an error message; empty if it may be continued.

    Args:
        settings: those here, with what "auto" stands for.
        saved: ``Settings.method`` when it was saved, by this or an earlier version.
    """
    if saved.get("version") != DESCRIPTION_VERSION:
        return f"they are of version {saved.get('version')} of their format, this Lentando reads {DESCRIPTION_VERSION}"
    then = {key: value for key, value in with_defaults(dict(saved), settings).items() if key not in CHANGEABLE}
    found = differences([then, settings.method])
    return "; ".join(f"{key} was {before}, and is {here} here" for key, (before, here) in found)
