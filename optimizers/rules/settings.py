"""The four independent choices that make up a method, checked once, for all frameworks alike.

Base optimizer, base algorithm, outer step and communication period; every method in the papers is one setting of them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from math import isnan
from typing import Literal, TypeAlias, get_args

from lentando.comm.checks import check_choice, check_flag, check_has
from lentando.comm.collectives import Algorithm
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.non_finite import OnNonFinite
from lentando.optimizers.rules.outer_rule import OuterRule
from lentando.optimizers.rules.period import Period, PeriodSetting, as_period, needs_loss
from lentando.optimizers.rules.words import UNSAID, in_words

__all__ = ["BaseBuffers", "Settings"]

BASE_ALGORITHM = ("averages_gradients", "communicates", "mixes_parameters", "bind")
"""What every base algorithm has."""

BaseBuffers: TypeAlias = Literal["reset", "maintain", "average", "auto"]


@dataclass(frozen=True)
class Settings:
    """How replicas train together.

    Args:
        base: what they say to each other at each inner step.
        outer: slow momentum, or another rule, at each outer step; None adopts the exact average.
        period: inner steps between outer steps, or a schedule of them; None for no outer steps.
        base_buffers: what an outer step does to the base optimizer's own state: "reset" makes it new, "maintain" leaves
            it, "average" averages its buffers over the ranks. "auto" is "maintain" for optimizers that divide by a
            running mean of squared gradients, which would have to be learnt anew (Adam, RMSprop, ...), and "reset"
            for others (SGD, ...): the choice of SlowMo's authors. Told by a hyperparameter that is called "eps...". It
            is "average" for optimizers that keep a moving average of the weights (Keras's ``use_ema=True``).
        exact_average: False leaves out the average: each replica applies the outer rule to itself.
        algorithm: how the exact average is formed.
        on_nonfinite: what is done about a rank whose parameters, gradients or loss are not finite when the ranks
            communicate. "raise" is an error on every rank; "skip" leaves them out of the average, which that rank then
            adopts, with a new base optimizer.
        rates_may_differ: ranks train at learning rates of their own on purpose, which is otherwise an error at
            construction, and a warning later.

    Raises:
        ConfigurationError: for values that cannot work.
    """

    base: BaseAlgorithm = AllReduce()
    outer: OuterRule | None = None
    period: PeriodSetting = None
    base_buffers: BaseBuffers = "maintain"
    exact_average: bool = True
    algorithm: Algorithm = "auto"
    on_nonfinite: OnNonFinite = field(default="raise", metadata=UNSAID)
    rates_may_differ: bool = field(default=False, metadata=UNSAID)

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

    def in_words(self) -> str:
        """The settings, the same on every rank that has the same."""
        return in_words(self)

    def method_in_words(self) -> str:
        """Those that a checkpoint must be continued with, but for defaults that older ones do not speak of."""
        return in_words(replace(self, on_nonfinite="raise", rates_may_differ=False), with_unsaid=False)

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
                f"{in_words(self.outer)} needs the learning rate of the steps, and {found}. Use DiLoCo, whose outer "
                "step does not go by it, slow_momentum=0, or a base optimizer with a learning rate"
            )
        period = self.make_period()
        if period is not None and getattr(period, "needs_learning_rate", False):
            raise ConfigurationError(
                f"{in_words(period)} follows the learning rate, and {found}. Use a fixed period, or a base optimizer "
                "with a learning rate"
            )

    def make_period(self) -> Period | None:
        """The period as a schedule."""
        return None if self.period is None else as_period(self.period)
