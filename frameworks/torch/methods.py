"""The papers' methods by name: ``DistributedOptimizer`` with the settings of each method."""

from typing import TYPE_CHECKING

import torch

from lentando.optimizers.keyword_arguments import takes_arguments_of
from lentando.optimizers.methods import (
    AdaCommArguments,
    DiLoCoArguments,
    SlowMoArguments,
    adacomm,
    diloco,
    slowmo,
)
from lentando.torch.optimizer import DistributedOptimizer, NamedParameters

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdaComm", "DiLoCo", "SlowMo"]


@takes_arguments_of(slowmo, SlowMoArguments)
class SlowMo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with SlowMo: exact averages, to which slow momentum is applied.

    Args:
        **settings: keyword arguments of ``lentando.optimizers.slowmo``.

    Example:
        >>> import torch, lentando.torch as lt
        >>> lt.init()
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=2)
        >>> for _ in range(4):
        ...     optimizer.zero_grad()
        ...     model(torch.ones(8, 2)).square().mean().backward()
        ...     optimizer.step()
        >>> optimizer.report()["rounds"]
        2
        >>> lt.shutdown()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: torch.nn.Module | None = None,
        named_parameters: NamedParameters | None = None,
        **settings: "Unpack[SlowMoArguments]",
    ) -> None:
        super().__init__(optimizer, model=model, named_parameters=named_parameters, **vars(slowmo(**settings)))


@takes_arguments_of(diloco, DiLoCoArguments)
class DiLoCo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with DiLoCo: long local rounds and an outer SGD with Nesterov momentum.

    Args:
        **settings: keyword arguments of ``lentando.optimizers.diloco``.

    Example:
        >>> import torch, lentando.torch as lt
        >>> lt.init()
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = lt.DiLoCo(torch.optim.AdamW(model.parameters(), lr=4e-4), model=model, period=500)
        >>> optimizer.period
        500
        >>> lt.shutdown()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: torch.nn.Module | None = None,
        named_parameters: NamedParameters | None = None,
        **settings: "Unpack[DiLoCoArguments]",
    ) -> None:
        super().__init__(optimizer, model=model, named_parameters=named_parameters, **vars(diloco(**settings)))


@takes_arguments_of(adacomm, AdaCommArguments)
class AdaComm(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with AdaComm: rounds that become shorter as the training loss falls.

    Args:
        **settings: keyword arguments of ``lentando.optimizers.adacomm``.

    Example:
        >>> import torch, lentando.torch as lt
        >>> lt.init()
        >>> model = torch.nn.Linear(2, 1)
        >>> sgd = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> optimizer = lt.AdaComm(sgd, model=model, initial_period=8, interval_seconds=30.0)
        >>> loss = model(torch.ones(8, 2)).square().mean()
        >>> loss.backward()
        >>> optimizer.step(loss=loss)
        >>> optimizer.period
        8
        >>> lt.shutdown()
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: torch.nn.Module | None = None,
        named_parameters: NamedParameters | None = None,
        **settings: "Unpack[AdaCommArguments]",
    ) -> None:
        super().__init__(optimizer, model=model, named_parameters=named_parameters, **vars(adacomm(**settings)))
