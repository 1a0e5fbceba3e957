"""The papers' methods by name: ``DistributedOptimizer`` with the settings of each method."""

from typing import TYPE_CHECKING

import keras

from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.optimizers.checkpoint.weight_map import WeightMap
from lentando.optimizers.method_classes import ADACOMM, DILOCO, SLOWMO
from lentando.optimizers.methods import AdaCommArguments, DiLoCoArguments, SlowMoArguments
from lentando.tensorflow.optimizer import DistributedOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdaComm", "DiLoCo", "SlowMo"]


@keras.saving.register_keras_serializable("lentando")
@SLOWMO
class SlowMo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with SlowMo: exact averages, to which slow momentum is applied."""

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        *,
        process_set: ProcessSet = global_process_set,
        model: keras.Model | None = None,
        mapping: WeightMap | None = None,
        **settings: "Unpack[SlowMoArguments]",
    ) -> None: ...


@keras.saving.register_keras_serializable("lentando")
@DILOCO
class DiLoCo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with DiLoCo: long local rounds and an outer SGD with Nesterov momentum."""

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        *,
        process_set: ProcessSet = global_process_set,
        model: keras.Model | None = None,
        mapping: WeightMap | None = None,
        **settings: "Unpack[DiLoCoArguments]",
    ) -> None: ...


@keras.saving.register_keras_serializable("lentando")
@ADACOMM
class AdaComm(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with AdaComm: rounds that become shorter as the training loss falls."""

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        *,
        process_set: ProcessSet = global_process_set,
        model: keras.Model | None = None,
        mapping: WeightMap | None = None,
        **settings: "Unpack[AdaCommArguments]",
    ) -> None: ...
