"""The papers' methods by name: ``DistributedOptimizer`` with the settings of each method."""

from typing import TYPE_CHECKING

import keras

from lentando.optimizers.checkpoint.weight_map import WeightMap
from lentando.optimizers.keyword_arguments import takes_arguments_of
from lentando.optimizers.methods import (
    AdaCommArguments,
    DiLoCoArguments,
    SlowMoArguments,
    adacomm,
    diloco,
    slowmo,
)
from lentando.tensorflow.optimizer import DistributedOptimizer

if TYPE_CHECKING:
    from typing_extensions import Unpack

__all__ = ["AdaComm", "DiLoCo", "SlowMo"]


@keras.saving.register_keras_serializable("lentando")
@takes_arguments_of(slowmo, SlowMoArguments)
class SlowMo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with SlowMo: exact averages, to which slow momentum is applied.

    Args:
        **settings: keyword arguments of ``lentando.optimizers.slowmo``.

    Example:
        >>> import keras, numpy as np, lentando.tensorflow as lt
        >>> lt.init()
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.compile(lt.SlowMo(keras.optimizers.SGD(0.1), model=model, period=2), "mse")
        >>> history = model.fit(np.ones([8, 2]), np.ones([8, 1]), batch_size=2, verbose=0)
        >>> model.optimizer.report()["rounds"]
        2
        >>> lt.shutdown()
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        *,
        model: keras.Model | None = None,
        mapping: WeightMap | None = None,
        **settings: "Unpack[SlowMoArguments]",
    ) -> None:
        super().__init__(optimizer, model=model, mapping=mapping, **vars(slowmo(**settings)))


@keras.saving.register_keras_serializable("lentando")
@takes_arguments_of(diloco, DiLoCoArguments)
class DiLoCo(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with DiLoCo: long local rounds and an outer SGD with Nesterov momentum.

    Args:
        **settings: keyword arguments of ``lentando.optimizers.diloco``.

    Example:
        >>> import keras, numpy as np, lentando.tensorflow as lt
        >>> lt.init()
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.compile(lt.DiLoCo(keras.optimizers.AdamW(4e-4), model=model, period=500), "mse")
        >>> history = model.fit(np.ones([8, 2]), np.ones([8, 1]), batch_size=2, verbose=0)
        >>> model.optimizer.period
        500
        >>> lt.shutdown()
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        *,
        model: keras.Model | None = None,
        mapping: WeightMap | None = None,
        **settings: "Unpack[DiLoCoArguments]",
    ) -> None:
        super().__init__(optimizer, model=model, mapping=mapping, **vars(diloco(**settings)))


@keras.saving.register_keras_serializable("lentando")
@takes_arguments_of(adacomm, AdaCommArguments)
class AdaComm(DistributedOptimizer):
    """A ``DistributedOptimizer`` that trains with AdaComm: rounds that become shorter as the training loss falls.

    Args:
        **settings: keyword arguments of ``lentando.optimizers.adacomm``.

    Example:
        >>> import keras, numpy as np, lentando.tensorflow as lt
        >>> lt.init()
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> model.compile(lt.AdaComm("sgd", model=model, initial_period=8, interval_seconds=30.0), "mse")
        >>> history = model.fit(np.ones([8, 2]), np.ones([8, 1]), batch_size=2, verbose=0)
        >>> model.optimizer.period
        8
        >>> lt.shutdown()
    """

    def __init__(
        self,
        optimizer: keras.optimizers.Optimizer | str,
        *,
        model: keras.Model | None = None,
        mapping: WeightMap | None = None,
        **settings: "Unpack[AdaCommArguments]",
    ) -> None:
        super().__init__(optimizer, model=model, mapping=mapping, **vars(adacomm(**settings)))
