"""The papers' methods by name: ``DistributedOptimizer`` with the settings of each method."""

from typing import TYPE_CHECKING

from lentando.toy.library import SGD
from lentando.toy.optimizer import DistributedOptimizer

from lentando.optimizers.method_classes import ADACOMM, DILOCO, SLOWMO
from lentando.optimizers.methods import AdaCommArguments, DiLoCoArguments, SlowMoArguments

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdaComm", "DiLoCo", "SlowMo"]


@SLOWMO
class SlowMo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with SlowMo."""

    def __init__(self, optimizer: SGD, **settings: "Unpack[SlowMoArguments]") -> None: ...


@DILOCO
class DiLoCo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with DiLoCo."""

    def __init__(self, optimizer: SGD, **settings: "Unpack[DiLoCoArguments]") -> None: ...


@ADACOMM
class AdaComm(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with AdaComm."""

    def __init__(self, optimizer: SGD, **settings: "Unpack[AdaCommArguments]") -> None: ...
