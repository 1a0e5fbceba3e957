"""The papers' methods by name: settings of ``DistributedOptimizer``."""

from typing import Any

import torch

from lentando.comm.collectives import Algorithm
from lentando.optimizers.rules.adacomm import adacomm
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.non_finite import OnNonFinite
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.period import Period
from lentando.optimizers.rules.settings import BaseBuffers
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.torch.optimizer import DistributedOptimizer, NamedParameters

__all__ = ["AdaComm", "DiLoCo", "SlowMo"]


def SlowMo(  # noqa: N802 - reads as the optimizer that it makes
    optimizer: torch.optim.Optimizer,
    *,
    model: torch.nn.Module | None = None,
    named_parameters: NamedParameters | None = None,
    base: BaseAlgorithm = LocalSGD(),
    period: int | Period = 12,
    slow_lr: float = 1.0,
    slow_momentum: float = 0.5,
    nesterov: bool = False,
    exact_average: bool = True,
    base_buffers: BaseBuffers = "auto",
    algorithm: Algorithm = "auto",
    on_nonfinite: OnNonFinite = "raise",
    rates_may_differ: bool = False,
) -> DistributedOptimizer:
    """Slow momentum over ``base`` (Wang et al., ICLR 2020, arXiv 1910.00643): a setting of ``DistributedOptimizer``.

    Args:
        optimizer: the base optimizer.
        model: see ``DistributedOptimizer``, like every argument that is not listed here.
        named_parameters: see there.
        base: what replicas say to each other between outer steps.
        period: inner steps between outer steps (tau). The paper's: 12 for Local SGD, 48 over gossip.
        slow_lr: alpha; 1 is consistently best in the paper. The paper's gamma, by which slow momentum is divided and
            multiplied, is the mean of the learning rates with which the round's steps were taken.
        slow_momentum: beta, the more the more workers; 0.4 to 0.8 in the paper.
        nesterov: look ahead along the slow momentum. For DiLoCo use ``DiLoCo``, whose rule does not divide by the rate.
        exact_average: see there.
        base_buffers: "auto" is the paper's choice: "reset" for SGD and its like, "maintain" for Adam and other
            optimizers with second moments; see ``DistributedOptimizer``.
        algorithm: see there.
        on_nonfinite: see there.
        rates_may_differ: see there.
    """
    return DistributedOptimizer(
        optimizer,
        model=model,
        named_parameters=named_parameters,
        base=base,
        outer=SlowMomentum(slow_lr, slow_momentum, nesterov),
        period=period,
        base_buffers=base_buffers,
        exact_average=exact_average,
        algorithm=algorithm,
        on_nonfinite=on_nonfinite,
        rates_may_differ=rates_may_differ,
    )


def DiLoCo(  # noqa: N802 - reads as the optimizer that it makes
    optimizer: torch.optim.Optimizer,
    *,
    model: torch.nn.Module | None = None,
    named_parameters: NamedParameters | None = None,
    base: BaseAlgorithm = LocalSGD(),
    period: int | Period = 500,
    outer_lr: float = 0.7,
    outer_momentum: float = 0.9,
    nesterov: bool = True,
    base_buffers: BaseBuffers = "maintain",
    algorithm: Algorithm = "auto",
    on_nonfinite: OnNonFinite = "raise",
    rates_may_differ: bool = False,
) -> DistributedOptimizer:
    """DiLoCo (Douillard et al., arXiv 2311.08105): long rounds of local steps, then SGD with Nesterov momentum outside.

    A setting of ``DistributedOptimizer`` with ``OuterSGD``: the outer step is that of ``torch.optim.SGD`` on anchor -
    average. It is not scaled by the inner learning rate, so that inner schedules leave it as it is, and the inner
    optimizer keeps its state.

    The paper's inner optimizer is AdamW(lr=4e-4, weight_decay=0.1), with warm-up and cosine decay. MuLoCo (arXiv
    2505.23725) is the same with Muon inside and shorter rounds: ``period=30``, with ``outer_lr=0.7,
    outer_momentum=0.5`` in a published speed record.

    Args:
        optimizer: the base (inner) optimizer.
        model: see ``DistributedOptimizer``, like every argument that is not listed here.
        named_parameters: see there.
        base: what replicas say to each other between outer steps; the paper's say nothing.
        period: inner steps between outer steps (the paper's H).
        outer_lr: outer learning rate, > 0; 1 without momentum adopts the average.
        outer_momentum: outer momentum, >= 0 and < 1.
        nesterov: look ahead along the outer momentum; False for outer momentum 0.
        base_buffers: see there; the paper keeps the inner optimizer's state ("maintain").
        algorithm: see there.
        on_nonfinite: see there.
        rates_may_differ: see there.

    Raises:
        ConfigurationError: for values outside these ranges.
    """
    return DistributedOptimizer(
        optimizer,
        model=model,
        named_parameters=named_parameters,
        base=base,
        outer=OuterSGD(outer_lr, outer_momentum, nesterov),
        period=period,
        base_buffers=base_buffers,
        algorithm=algorithm,
        on_nonfinite=on_nonfinite,
        rates_may_differ=rates_may_differ,
    )


def AdaComm(  # noqa: N802 - reads as the optimizer that it makes
    optimizer: torch.optim.Optimizer,
    *,
    model: torch.nn.Module | None = None,
    named_parameters: NamedParameters | None = None,
    **options: Any,
) -> DistributedOptimizer:
    """Ever shorter rounds as the loss falls (Wang and Joshi, MLSys 2019, arXiv 1810.08313).

    A setting of ``DistributedOptimizer``. Every step must be given its training loss: ``step(loss=loss)``.

    Args:
        optimizer: the base optimizer.
        model: see ``DistributedOptimizer``.
        named_parameters: see there.
        options: of ``lentando.optimizers.rules.adacomm.adacomm``: ``base=LocalSGD()``, ``initial_period=16``,
            ``interval=60.0`` (seconds) or ``interval_steps``, ``max_period``, ``slow_momentum=0.0``, ...
    """
    settings = adacomm(**options)
    return DistributedOptimizer(optimizer, model=model, named_parameters=named_parameters, **vars(settings))
