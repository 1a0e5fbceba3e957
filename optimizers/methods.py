"""The methods of the papers by name: functions that return the settings of each.

``lt.SlowMo``, ``lt.DiLoCo`` and ``lt.AdaComm`` of a framework package take the same arguments and apply these settings.
"""

from typing import TYPE_CHECKING, Literal, TypedDict

from lentando.comm.collectives import Algorithm
from lentando.optimizers.keyword_arguments import takes_arguments_of
from lentando.optimizers.rules.adacomm import AdaptivePeriod
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.co2_momentum import CO2Momentum
from lentando.optimizers.rules.fragments import Delay
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.movement_penalty import MovementPenalty, Weighting
from lentando.optimizers.rules.non_finite import OnNonFinite
from lentando.optimizers.rules.outer_rule import OuterRule
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.outer_stepping import OuterAlgorithm
from lentando.optimizers.rules.period import Period, PeriodSetting, PostLocal
from lentando.optimizers.rules.settings import BaseBuffers, Settings
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.optimizers.rules.wire import WireDtype

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = [
    "AdaCommArguments",
    "DiLoCoArguments",
    "SettingsArguments",
    "SlowMoArguments",
    "adacomm",
    "diloco",
    "slowmo",
]


class CommonArguments(TypedDict, total=False):
    """Keyword arguments that mean the same for every method."""

    algorithm: Algorithm
    on_nonfinite: OnNonFinite
    rates_may_differ: bool
    wire_dtype: WireDtype | None
    weighting: Weighting
    movement_penalty: MovementPenalty | None


class StreamingArguments(CommonArguments, total=False):
    """Keyword arguments of the methods whose outer steps may be delayed, and taken in fragments."""

    delay: Delay
    fragments: int
    blend: float | None


class SettingsArguments(StreamingArguments, total=False):
    """Keyword arguments of ``DistributedOptimizer`` in every framework: those of ``Settings``."""

    base: BaseAlgorithm
    outer: OuterRule | OuterAlgorithm | None
    period: PeriodSetting
    base_buffers: BaseBuffers
    exact_average: bool


class SlowMoArguments(StreamingArguments, total=False):
    """Keyword arguments of ``SlowMo`` in every framework: those of ``slowmo``."""

    base: BaseAlgorithm
    period: int | Period
    slow_lr: float
    slow_momentum: float
    nesterov: bool
    exact_average: bool
    base_buffers: BaseBuffers
    gap_penalty: float
    momentum_clip: float | None


class DiLoCoArguments(StreamingArguments, total=False):
    """Keyword arguments of ``DiLoCo`` in every framework: those of ``diloco``."""

    base: BaseAlgorithm
    period: int | Period
    outer_lr: float
    outer_momentum: float
    nesterov: bool
    base_buffers: BaseBuffers


class AdaCommArguments(CommonArguments, total=False):
    """Keyword arguments of ``AdaComm`` in every framework: those of ``adacomm``."""

    base: BaseAlgorithm
    initial_period: int
    interval_seconds: float
    interval_steps: int | None
    min_period: int
    max_period: int | None
    refined: bool
    learning_rate_exponent: Literal[1, 3]
    loss_floor: float
    by_validation_loss: bool
    warmup_steps: int
    slow_momentum: float
    base_buffers: BaseBuffers | None


@takes_arguments_of(Settings, StreamingArguments)
def slowmo(
    *,
    base: BaseAlgorithm = LocalSGD(),
    period: int | Period = 12,
    slow_lr: float = 1.0,
    slow_momentum: float = 0.5,
    nesterov: bool = False,
    exact_average: bool = True,
    base_buffers: BaseBuffers = "auto",
    gap_penalty: float = 1.0,
    momentum_clip: float | None = None,
    **common: "Unpack[StreamingArguments]",
) -> Settings:
    """Return the settings of SlowMo.

    SlowMo (Wang, Tantia, Ballas, Rabbat, ICLR 2020, arXiv 1910.00643) averages the replicas exactly after every round
    of inner steps and applies slow momentum to the distance that the round has moved. ``SlowMomentum`` contains the
    equations.

    Args:
        base: how replicas communicate at each inner step: ``LocalSGD()``, not at all; ``SGP()``, ``OSGP()`` or
            ``DPSGD()``, by gossip; ``AllReduce()``, by averaging gradients.
        period: inner steps between two outer steps (the paper's tau), or a ``Period``. The paper uses 12 over Local SGD
            and 48 over gossip.
        slow_lr: slow learning rate (the paper's alpha), > 0. In the paper, 1 is consistently best. The paper's
            gamma, by which slow momentum is divided and multiplied, is the mean of the learning rates with which the
            steps of the round were taken.
        slow_momentum: slow momentum (the paper's beta), >= 0 and < 1. The paper uses 0.4 to 0.8, and more for more
            ranks.
        nesterov: whether the outer step looks ahead along the slow momentum. This is not DiLoCo, whose outer step does
            not divide by the learning rate: use ``DiLoCo`` for that.
        exact_average: whether an outer step begins with the exact average. If False, each replica applies slow
            momentum to its own parameters.
        base_buffers: what an outer step does to the base optimizer's state. "auto", the paper's choice, is "maintain"
            for optimizers with second moments (Adam, RMSprop, ...) and "reset" for others (SGD, ...). "maintain" leaves
            the state, "reset" makes it that of a new optimizer, "average" averages it over the ranks.
        gap_penalty: CO2's staleness gap penalty, >= 1, by which the distance that a round has moved is divided, for
            averages that are late (``delay=period``). ``CO2Momentum`` contains the equations.
        momentum_clip: CO2's limit of each element of the slow momentum, > 0, in units of a gradient; None for no limit.
        **common: the other arguments of ``Settings``.

    Raises:
        ConfigurationError: if a value is outside these ranges, or the settings exclude each other.

    Example:
        >>> slowmo(period=24).outer
        SlowMomentum(slow_lr=1.0, slow_momentum=0.5, nesterov=False)
        >>> slowmo(delay=12, gap_penalty=2.0).outer
        CO2Momentum(slow_lr=1.0, slow_momentum=0.5, nesterov=False, gap_penalty=2.0, momentum_clip=None)
    """
    outer = SlowMomentum(slow_lr, slow_momentum, nesterov)
    if gap_penalty != 1 or momentum_clip is not None:
        outer = CO2Momentum(slow_lr, slow_momentum, nesterov, gap_penalty, momentum_clip)
    return Settings(base, outer, period, base_buffers, exact_average, **common)


@takes_arguments_of(Settings, StreamingArguments)
def diloco(
    *,
    base: BaseAlgorithm = LocalSGD(),
    period: int | Period = 500,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    nesterov: bool = True,
    base_buffers: BaseBuffers = "maintain",
    **common: "Unpack[StreamingArguments]",
) -> Settings:
    """Return the settings of DiLoCo.

    DiLoCo (Douillard et al., arXiv 2311.08105) takes long rounds of local steps. Each ends with a step of SGD with
    Nesterov momentum, along the difference between the parameters at the beginning of the round and the average at its
    end. This outer step, ``OuterSGD``, is that of ``torch.optim.SGD``. It is not scaled by the inner learning rate, so
    that inner schedules do not change it.

    The paper's inner optimizer is AdamW(lr=4e-4, weight_decay=0.1) with warm-up and cosine decay. MuLoCo (arXiv
    2505.23725) is the same method with Muon as inner optimizer and shorter rounds: ``period=30``, with ``outer_lr=0.7,
    outer_momentum=0.5`` in a published speed record.

    Args:
        base: how replicas communicate at each inner step. ``LocalSGD()``, not at all, is the paper's choice.
        period: inner steps between two outer steps (the paper's H), or a ``Period``.
        outer_lr: outer learning rate, > 0. 1 without momentum adopts the average.
        outer_momentum: outer momentum, >= 0 and < 1.
        nesterov: whether the outer step looks ahead along the outer momentum. Must be False for outer momentum 0.
        base_buffers: what an outer step does to the inner optimizer's state. "maintain", the paper's choice, leaves it,
            "reset" makes it that of a new optimizer, "average" averages it over the ranks. "auto" is "maintain" for
            optimizers with second moments (Adam, RMSprop, ...) and "reset" for others (SGD, ...).
        **common: the other arguments of ``Settings``.

    Raises:
        ConfigurationError: if a value is outside these ranges, or the settings exclude each other.

    Example:
        >>> diloco(outer_momentum=0.5).outer
        OuterSGD(lr=0.7, momentum=0.5, nesterov=True)
    """
    return Settings(base, OuterSGD(outer_lr, outer_momentum, nesterov), period, base_buffers, **common)


@takes_arguments_of(Settings, CommonArguments)
def adacomm(
    *,
    base: BaseAlgorithm = LocalSGD(),
    initial_period: int = 16,
    interval_seconds: float = 60.0,
    interval_steps: int | None = None,
    min_period: int = 1,
    max_period: int | None = None,
    refined: bool = True,
    learning_rate_exponent: Literal[1, 3] = 1,
    loss_floor: float = 0.0,
    by_validation_loss: bool = False,
    warmup_steps: int = 0,
    slow_momentum: float = 0.0,
    base_buffers: BaseBuffers | None = None,
    **common: "Unpack[CommonArguments]",
) -> Settings:
    """Return the settings of AdaComm.

    AdaComm (Wang and Joshi, MLSys 2019, arXiv 1810.08313) averages rarely while the training loss is high, which costs
    little communication, and more often as the loss falls. Every step needs its training loss. ``AdaptivePeriod``
    contains the equation of the period.

    Args:
        base: how replicas communicate at each inner step, between two averages.
        initial_period: inner steps of the first rounds (the paper's tau_0). The paper searches for the longest period
            whose loss still falls fast at first.
        interval_seconds: seconds between two decisions, by the clock of rank 0. The paper uses 60; ``math.inf`` keeps
            the initial period.
        interval_steps: inner steps between two decisions, instead of ``interval_seconds``, so that a run can be
            repeated exactly.
        min_period: shortest period, in inner steps.
        max_period: longest period, in inner steps; None for no limit.
        refined: whether the period is halved when the loss is on a plateau at a constant learning rate.
        learning_rate_exponent: exponent of the learning rate's decay in the period, 1 (the paper's experiments) or 3
            (its theory). Where the learning rate drops by 10, 1 multiplies the period by 3 and 3 multiplies it by 31.
        loss_floor: lowest loss that can be reached.
        by_validation_loss: whether the period follows a validation loss, which every rank passes to
            ``optimizer.schedule.record_validation_loss`` at the same steps, and not the training loss. With
            ``warmup_steps``, this is ``optimizer.schedule.following.record_validation_loss``.
        warmup_steps: inner steps with an average after each, before the first round. Must cover a warm-up of the
            learning rate, because the periods are relative to the learning rate of the first round.
        slow_momentum: the paper's block momentum (beta), >= 0 and < 1; 0 adopts the average.
        base_buffers: what an average does to the base optimizer's state: "reset", "maintain", "average" or "auto", as
            for ``SlowMo``. None is "auto" with slow momentum, which for SGD is the paper's "reset", and "maintain"
            without, which at period 1 is synchronous momentum SGD.
        **common: ``algorithm``, ``on_nonfinite``, ``rates_may_differ``, ``wire_dtype``, ``weighting`` and
            ``movement_penalty`` of ``Settings``.

    Raises:
        ConfigurationError: if a value is outside these ranges, or the settings exclude each other.

    Example:
        >>> settings = adacomm(initial_period=8, interval_steps=100)
        >>> settings.period.initial_period
        8
    """
    period: Period = AdaptivePeriod(
        initial_period,
        interval_seconds,
        interval_steps,
        refined,
        learning_rate_exponent,
        loss_floor,
        min_period,
        max_period,
        by_validation_loss,
    )
    return Settings(
        base,
        SlowMomentum(1.0, slow_momentum) if slow_momentum != 0 else None,
        PostLocal(warmup_steps, period) if warmup_steps != 0 else period,
        base_buffers if base_buffers is not None else "auto" if slow_momentum != 0 else "maintain",
        **common,
    )
