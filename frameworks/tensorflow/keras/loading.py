"""Loading of a saved Keras model, with its optimizer wrapped for training on all ranks."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import h5py
import keras
import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.replica_optimizer import ReplicaOptimizer
from lentando.tensorflow.compression import Compression, Compressor
from lentando.tensorflow.keras.optimizers import DistributedOptimizer
from lentando.tensorflow.original_errors import convert_errors_of

__all__ = ["load_model"]


class _Factory:
    """A function that makes an object from its configuration, in place of a class.

    Args:
        function: function of the values in the configuration, as keyword arguments.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any, **options: Any) -> Any:
        return self._function(*arguments, **options)

    def from_config(self, config: Mapping[str, Any]) -> Any:
        """The object: what Keras calls on a class."""
        return self._function(**config)


def load_model(
    filepath: Any,
    custom_optimizers: Iterable[type] | None = None,
    custom_objects: Mapping[str, Any] | None = None,
    compression: type[Compressor] = Compression.none,
    legacy_opts: bool = False,
) -> keras.Model:
    """Load a model that ``model.save`` has written, and wrap its optimizer in a ``DistributedOptimizer``.

    The optimizer keeps its state, whether it was wrapped when the model was saved or not. Not collective: rank 0 may
    load a functional model alone, which the others build in the same way, and send it with
    ``BroadcastGlobalVariablesCallback``. Load a ``Sequential`` model on all ranks: Keras names its variables otherwise
    than those of a new one.

    Args:
        filepath: file of the model, ending in ``.keras`` or ``.h5``.
        custom_optimizers: classes of optimizers that are not Keras's own.
        custom_objects: further classes and functions, by name. A function of keyword arguments (``**config``) makes an
            optimizer; what is a ``DistributedOptimizer`` already is not wrapped again.
        compression: ``Compression.none``, ``fp16`` or ``bf16``.
        legacy_opts: False: Keras 3 has no legacy optimizers.

    Raises:
        ConfigurationError: if the model was saved without an optimizer.

    Example:
        >>> import lentando.tensorflow.keras as hvd
        >>> hvd.init()
        >>> model = hvd.load_model("checkpoint.keras")  # doctest: +SKIP
        >>> history = model.fit(dataset, callbacks=[hvd.callbacks.MetricAverageCallback()])  # doctest: +SKIP
        >>> hvd.shutdown()
    """
    if legacy_opts:
        raise ConfigurationError("legacy_opts=True is not possible: Keras 3 has no legacy optimizers")
    known = {optimizer.__name__: optimizer for optimizer in custom_optimizers or ()}
    known |= {name: _as_class(value) for name, value in (custom_objects or {}).items()}
    model = keras.saving.load_model(filepath, custom_objects=known)
    if getattr(model, "optimizer", None) is None:
        raise ConfigurationError(
            f"{filepath} contains a model without an optimizer (it was saved before compile): load it with "
            "keras.saving.load_model, and compile it with a DistributedOptimizer"
        )
    if not isinstance(model.optimizer, ReplicaOptimizer):
        if str(filepath).endswith((".h5", ".hdf5")):
            _restore_optimizer(model, filepath)
        model.optimizer = DistributedOptimizer(model.optimizer, compression=compression)
    convert_errors_of(model)
    return model


def _restore_optimizer(model: keras.Model, filepath: Any) -> None:
    """Restore the optimizer of a model from an .h5 file, which Keras builds for no variables (Keras 3.15.1).

    Raises:
        ConfigurationError: if the file has other variables than the optimizer.
    """
    with h5py.File(filepath) as file:
        group = file.get("optimizer_weights")
        if group is None:
            return
        # A list of names that is too long for one attribute is divided: weight_names0, weight_names1, ...
        parts = sorted((key for key in group.attrs if key.startswith("weight_names")), key=lambda key: (len(key), key))
        values = [np.asarray(group[path]) for part in parts for path in group.attrs[part].astype(str)]
    optimizer = model.optimizer
    if len(optimizer.variables) == len(values):
        return
    optimizer = type(optimizer).from_config(optimizer.get_config())
    optimizer.build(model.trainable_variables)
    if [tuple(variable.shape) for variable in optimizer.variables] != [value.shape for value in values]:
        raise ConfigurationError(
            f"{filepath} contains {len(values)} variables of the optimizer, in other shapes than the "
            f"{len(optimizer.variables)} of {type(optimizer).__name__} here: load the model with "
            "keras.saving.load_model(..., compile=False), and compile it with a new DistributedOptimizer"
        )
    for variable, value in zip(optimizer.variables, values, strict=True):
        variable.assign(value)
    model.optimizer = optimizer


def _as_class(value: Any) -> Any:
    """A custom object as Keras takes it: functions that make an optimizer have keyword arguments of any name."""
    if not isinstance(value, FunctionType):
        return value
    kinds = {parameter.kind for parameter in inspect.signature(value).parameters.values()}
    return _Factory(value) if inspect.Parameter.VAR_KEYWORD in kinds else value
