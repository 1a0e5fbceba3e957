"""The settings of a method, checked once for all frameworks.

Base optimizer, base algorithm, outer step and communication period are independent choices; every method in the papers
is one combination of them.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from math import isnan
from typing import Any, get_args

from lentando.comm.checks import check_choice, check_flag, check_has
from lentando.comm.collectives import Algorithm
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.optimizer_description import OptimizerDescription
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.combined_settings import BaseBuffers, CombinedSettings
from lentando.optimizers.rules.describe import CLASS, as_text, describe
from lentando.optimizers.rules.fragments import Delay
from lentando.optimizers.rules.movement_penalty import MovementPenalty, Weighting
from lentando.optimizers.rules.non_finite import OnNonFinite
from lentando.optimizers.rules.outer_rule import OuterRule
from lentando.optimizers.rules.outer_stepping import OuterAlgorithm
from lentando.optimizers.rules.period import PeriodSetting
from lentando.optimizers.rules.wire import WireDtype

__all__ = ["DESCRIPTION_VERSION", "BaseBuffers", "Settings", "method_of"]

DESCRIPTION_VERSION = 1
"""Version of ``Settings.description``. A field that is added with a default that changes nothing needs no new one."""

CHANGEABLE = ("on_nonfinite", "rates_may_differ")
"""Settings that may differ between a checkpoint and the run that resumes from it."""

CHANGEABLE_OF_ALL_REDUCE = ("overlap", "bucket_bytes")
"""The same of ``AllReduce`` as base algorithm: when gradients are sent, not what is trained."""

BASE_ALGORITHM = ("averages_gradients", "communicates", "mixes_parameters", "bind")
"""Attributes that every base algorithm has."""


@dataclass(frozen=True)
class Settings(CombinedSettings):
    """How replicas train together.

    Args:
        base: base algorithm, that is, how replicas communicate at each inner step: ``AllReduce()``, ``LocalSGD()``,
            ``SGP()``, ``OSGP()`` or ``DPSGD()``.
        outer: outer rule that each outer step applies to the exact average: ``SlowMomentum(...)`` or ``OuterSGD(...)``;
            None adopts the average. An ``OuterAlgorithm`` takes outer steps of its own kind.
        period: inner steps between two outer steps, or a ``Period``; None for no outer steps. With
            ``RoundSeconds(...)`` or ``StepsByRank(...)`` fast ranks take more of them than slow ones.
        base_buffers: what an outer step does to the base optimizer's state: "reset" makes it that of a new optimizer,
            "maintain" leaves it, "average" averages its buffers over the ranks. "auto" is the choice of SlowMo's
            authors: "maintain" for optimizers that divide by a running mean of squared gradients, which would have to
            be learned again (Adam, RMSprop, ...; recognized by a hyperparameter whose name begins with "eps"), and
            "reset" for others (SGD, ...). It is "average" for optimizers that keep a moving average of the weights
            (Keras's ``use_ema=True``).
        exact_average: whether an outer step begins with the exact average. If False, each replica applies the outer
            rule to its own parameters.
        algorithm: how the exact average is formed: "ring"; "backend", the all-reduce of MPI, Horovod or NCCL;
            "auto", which chooses by size; or "measured", which compares all implementations once in a job, so that
            results may be rounded differently the next time that the job is started.
        on_nonfinite: what happens if parameters, gradients or the loss of a rank are not finite when the ranks
            communicate: "raise" raises an error on every rank, which names that rank; "skip" leaves its values out of
            the average, which that rank then adopts, with a new base optimizer.
        rates_may_differ: whether the learning rates of the ranks differ on purpose. Otherwise a difference is an error
            at construction and one warning later, as soon as the ranks exchange messages that show it: with every
            average of gradients and every outer step, but not with gossip alone.
        delay: inner steps between the end of a round, when each rank contributes its parameters to an average that is
            formed in the background, and the step after which all ranks adopt the outer step, at most the period. The
            communication overlaps these steps, and the distance that a rank moves in them is added to the result. 0
            waits for the average. If a round is shorter than the delay (with a ``Period``), the outer step is adopted
            at its end. "auto" lets each of the first averages overlap a whole round, measures them, and then chooses
            the smallest delay that hides them, the same on all ranks (``lentando.optimizers.rules.delay_choice``).
            Every rank keeps the anchor, the average and the contribution of the whole model in memory, and the momentum
            of the outer rule.
        fragments: number of parts of about equal size into which the model is cut, by consecutive parameters. They are
            averaged at different steps of the round, evenly spread, so that the link never carries more than one part
            at once (Streaming DiLoCo, arXiv 2501.18512). They take the same memory as ``delay``. The outer rule uses
            the mean learning rate since the round began. With more than one, ``base_buffers`` must be "maintain", which
            is then what "auto" means.
        blend: share, from 0 to 1, of a rank's own parameters in what it adopts; the rest is the outer step's result
            (alpha of Streaming DiLoCo, which uses 0.5; 1 minus the pullback of Overlap-Local-SGD, arXiv 2002.09539).
            None adds what the rank has moved since its contribution to the outer step's result.
        wire_dtype: how the exact average of an outer step is sent: None in full precision; "int8", "int4", "bfloat16"
            or "float16" in fewer bits, by what each rank has moved in the round, with error feedback
            (``lentando.optimizers.rules.movement_average``; "int8" and "int4" are described in
            ``lentando.optimizers.rules.block_scaling``). Both halves of the average send fewer bytes, the replicas
            are bit-identical after each outer step, and statistics are sent in full precision. Each rank keeps
            10 + 12 / n more bytes for each parameter of float32 ("int8"; 9 + 12 / n with "int4").
        weighting: weights of the movements of the ranks in outer steps: "equal"; "steps", their inner steps of the
            round, which differ inside ``join`` and with ``RoundSeconds`` or ``StepsByRank``; or "samples", the sum of
            ``step(samples=...)`` in the round, as in FedAvg (McMahan et al., AISTATS 2017, arXiv 1602.05629,
            algorithm 1). "normalized" multiplies all movements by the most steps of a rank divided by their mean, so
            that every gradient counts the same and the average moves as far as the rank with the most steps
            (FedNova, Wang et al., NeurIPS 2020, arXiv 2007.07481). A rank of weight 0 adopts the average of the
            others. Statistics are averaged equally over the ranks with a weight > 0. Each rank keeps
            12 + 4 / n more bytes for each parameter of float32, or only those of ``wire_dtype`` if that is given.
        movement_penalty: ``MovementPenalty(...)``, which keeps the movement of one bad rank from spoiling the average;
            or None. Takes the same memory as ``weighting``.

    Raises:
        ConfigurationError: for values that cannot work.
    """

    base: BaseAlgorithm = AllReduce()
    outer: OuterRule | OuterAlgorithm | None = None
    period: PeriodSetting = None
    base_buffers: BaseBuffers = "maintain"
    exact_average: bool = True
    algorithm: Algorithm = "auto"
    on_nonfinite: OnNonFinite = "raise"
    rates_may_differ: bool = False
    delay: Delay = 0
    fragments: int = 1
    blend: float | None = None
    wire_dtype: WireDtype | None = None
    weighting: Weighting = "equal"
    movement_penalty: MovementPenalty | None = None

    def __post_init__(self) -> None:
        check_has("base", self.base, BASE_ALGORITHM, "AllReduce(), LocalSGD(), SGP()")
        if self.outer is not None and (isinstance(self.outer, type) or not isinstance(self.outer, OuterAlgorithm)):
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
        self.check_combination()

    @cached_property
    def description(self) -> dict[str, Any]:
        """The settings as plain data, by which ranks compare them: the result of ``describe`` for each field.

        Computed once, before training, because a user's own objects may change their attributes later.
        """
        return {"version": DESCRIPTION_VERSION, **{f.name: describe(getattr(self, f.name)) for f in fields(self)}}

    @property
    def method(self) -> dict[str, Any]:
        """The part of ``description`` that must be equal when a checkpoint is resumed."""
        return method_of(self.description)

    def for_optimizer(self, description: OptimizerDescription) -> "Settings":
        """The settings with "auto" replaced by what it stands for.

        Args:
            description: description of the base optimizer.
        """
        if self.base_buffers != "auto":
            return self
        if description.keeps_average_of_weights:
            return replace(self, base_buffers="average")
        if self.fragments > 1:
            return replace(self, base_buffers="maintain")
        return replace(self, base_buffers="maintain" if description.keeps_second_moments else "reset")

    def check_learning_rates(self, rates: Sequence[float]) -> None:
        """Check that the base optimizer has the learning rates that the method needs.

        Args:
            rates: learning rate of each parameter group; NaN for a group that has none.

        Raises:
            ConfigurationError: if a group has none, and the outer rule or the period needs one.
        """
        missing = [number for number, rate in enumerate(rates) if isnan(rate)]
        if not missing:
            return
        lack = f"parameter group {missing[0]} of the base optimizer has none (no 'lr', or None)"
        if self.outer is not None and self.outer.needs_learning_rate:
            raise ConfigurationError(
                f"{as_text(describe(self.outer))} needs the learning rate of the steps, and {lack}. Use DiLoCo, whose "
                "outer step does not use it, slow_momentum=0, or a base optimizer with a learning rate"
            )
        period = self.make_period()
        if period is not None and getattr(period, "needs_learning_rate", False):
            raise ConfigurationError(
                f"{as_text(describe(period))} follows the learning rate, and {lack}. Use a fixed period, or a base "
                "optimizer with a learning rate"
            )


def method_of(description: Mapping[str, Any]) -> dict[str, Any]:
    """The part of a description that must be equal when a checkpoint is resumed.

    Args:
        description: ``Settings.description`` of this or an earlier version, or such a part of it.
    """
    method = {key: value for key, value in description.items() if key not in CHANGEABLE}
    base = method.get("base")
    if isinstance(base, dict) and base.get(CLASS) == AllReduce.__name__:
        method["base"] = {key: value for key, value in base.items() if key not in CHANGEABLE_OF_ALL_REDUCE}
    return method
