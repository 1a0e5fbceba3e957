"""The papers' methods by name: ``DistributedOptimizer`` with the settings of each method."""

from typing import TYPE_CHECKING

import torch

from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.optimizers.method_classes import ADACOMM, DILOCO, SLOWMO
from lentando.optimizers.methods import AdaCommArguments, DiLoCoArguments, SlowMoArguments
from lentando.torch.optimizer import DistributedOptimizer, NamedParameters

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdaComm", "DiLoCo", "SlowMo"]


@SLOWMO
class SlowMo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with SlowMo: exact averages, to which slow momentum is applied."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: torch.nn.Module | None = None,
        named_parameters: NamedParameters | None = None,
        process_set: ProcessSet = global_process_set,
        **settings: "Unpack[SlowMoArguments]",
    ) -> None: ...


@DILOCO
class DiLoCo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with DiLoCo: long local rounds and an outer SGD with Nesterov momentum."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: torch.nn.Module | None = None,
        named_parameters: NamedParameters | None = None,
        process_set: ProcessSet = global_process_set,
        **settings: "Unpack[DiLoCoArguments]",
    ) -> None: ...


@ADACOMM
class AdaComm(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with AdaComm: rounds that become shorter as the training loss falls."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        model: torch.nn.Module | None = None,
        named_parameters: NamedParameters | None = None,
        process_set: ProcessSet = global_process_set,
        **settings: "Unpack[AdaCommArguments]",
    ) -> None: ...
