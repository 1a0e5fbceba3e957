"""``DistributedOptimizer`` and ``PartialDistributedOptimizer`` as Horovod's Keras modules have them."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras

from lentando.comm.operations import Average, Op
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.tensorflow import optimizer as _optimizer
from lentando.tensorflow.compression import Compression, Compressor
from lentando.tensorflow.local_variables import variables_of_layers

__all__ = ["DistributedOptimizer", "PartialDistributedOptimizer"]


def DistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: keras.optimizers.Optimizer | str,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: type[Compressor] = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Op = Average,
    backward_passes_per_step: int = 1,
    average_aggregated_gradients: bool = False,
    num_groups: int = 0,
    groups: int | Sequence[Iterable[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    scale_local_gradients: bool = True,
    **settings: Any,
) -> _optimizer.DistributedOptimizer:
    """Wrap a Keras optimizer: ``lentando.tensorflow.DistributedOptimizer``, with another order of arguments.

    Args:
        optimizer: the base optimizer.
        name: name of the result.
        device_dense: no effect; accepted for scripts that were written for Horovod.
        device_sparse: no effect.
        compression: ``Compression.none``, ``fp16`` or ``bf16``.
        sparse_as_dense: as for ``lentando.tensorflow.DistributedOptimizer``, like all further arguments.
        gradient_predivide_factor: factor that splits the division by the number of ranks.
        op: how the gradients of the ranks are combined.
        backward_passes_per_step: calls of ``apply`` whose gradients are summed before a step.
        average_aggregated_gradients: whether that sum is divided by their number.
        num_groups: older name of ``groups``.
        groups: gradients that Horovod sends together.
        process_set: the ranks that train together.
        scale_local_gradients: whether gradients of local variables are divided by the number of ranks.
        **settings: Lentando's own arguments: ``model=``, ``base=``, ``period=``, ...

    Example:
        >>> import keras, numpy as np, lentando.tensorflow.keras as hvd
        >>> hvd.init()
        >>> model = keras.Sequential([keras.Input([2]), keras.layers.Dense(1)])
        >>> optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1 * hvd.size(), momentum=0.9))
        >>> model.compile(optimizer, "mse")
        >>> callbacks = [hvd.callbacks.BroadcastGlobalVariablesCallback(0), hvd.callbacks.MetricAverageCallback()]
        >>> history = model.fit(np.ones([8, 2]), np.ones([8]), batch_size=4, verbose=0, callbacks=callbacks)
        >>> int(optimizer.iterations)
        2
        >>> hvd.shutdown()
    """
    return _optimizer.DistributedOptimizer(
        optimizer,
        name=name,
        device_dense=device_dense,
        device_sparse=device_sparse,
        compression=compression,
        sparse_as_dense=sparse_as_dense,
        gradient_predivide_factor=gradient_predivide_factor,
        op=op,
        backward_passes_per_step=backward_passes_per_step,
        average_aggregated_gradients=average_aggregated_gradients,
        num_groups=num_groups,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
        **settings,
    )


def PartialDistributedOptimizer(  # noqa: N802 - Horovod's name
    optimizer: keras.optimizers.Optimizer | str,
    name: str | None = None,
    device_dense: str = "",
    device_sparse: str = "",
    compression: type[Compressor] = Compression.none,
    sparse_as_dense: bool = False,
    gradient_predivide_factor: float = 1.0,
    op: Op = Average,
    groups: int | Sequence[Iterable[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    local_layers: keras.layers.Layer | Iterable[keras.layers.Layer] | None = None,
    scale_local_gradients: bool = True,
) -> _optimizer.DistributedOptimizer:
    """Wrap a Keras optimizer, and leave out layers that every rank trains for itself.

    Args:
        optimizer: the base optimizer.
        name: as for ``DistributedOptimizer``, like all further arguments but one.
        device_dense: no effect.
        device_sparse: no effect.
        compression: ``Compression.none``, ``fp16`` or ``bf16``.
        sparse_as_dense: whether sparse gradients are sent with all rows.
        gradient_predivide_factor: factor that splits the division by the number of ranks.
        op: how the gradients of the ranks are combined.
        groups: gradients that Horovod sends together.
        process_set: the ranks that train together.
        local_layers: a layer or layers, which have been built, whose variables are not averaged.
        scale_local_gradients: whether the gradients of these are divided by the number of ranks.

    Raises:
        ConfigurationError: for local layers that are not layers, or have not been built.
    """
    variables = variables_of_layers(local_layers)
    wrapped = DistributedOptimizer(
        optimizer,
        name,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        gradient_predivide_factor,
        op,
        groups=groups,
        process_set=process_set,
        scale_local_gradients=scale_local_gradients,
    )
    for variable in variables:
        wrapped.register_local_var(variable)
    return wrapped
