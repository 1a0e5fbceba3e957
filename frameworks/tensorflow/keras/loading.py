"""Loading of a saved Keras model, with its optimizer wrapped for training on all ranks."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
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
        custom_objects: further classes and functions, by name. A function under the name of an optimizer's class makes
            the optimizer from its configuration (``**config``); what is a ``DistributedOptimizer`` already is not
            wrapped again.
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
    known: dict[str, Any] = {optimizer.__name__: optimizer for optimizer in custom_optimizers or ()}
    known |= custom_objects or {}
    for name in known.keys() & _classes_in(filepath):
        if isinstance(known[name], FunctionType):
            known[name] = _Factory(known[name])
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
    optimizer = type(model.optimizer).from_config(model.optimizer.get_config())
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


def _classes_in(filepath: Any) -> set[str]:
    """Names of the classes of which a saved model has objects. Functions, such as losses, are not among them.

    Returns:
        Names as Keras looks them up; none if Keras itself will say that it cannot read the file.
    """
    if zipfile.is_zipfile(filepath):
        with zipfile.ZipFile(filepath) as archive:
            texts = [archive.read("config.json")]
    elif Path(filepath).is_file() and h5py.is_hdf5(filepath):
        with h5py.File(filepath) as file:
            texts = [file.attrs[name] for name in ("model_config", "training_config") if name in file.attrs]
    else:
        return set()
    return {name for text in texts for name in _class_names(json.loads(text))}


def _class_names(config: Any) -> Iterator[str]:
    if isinstance(config, list):
        config = dict(enumerate(config))
    if not isinstance(config, dict):
        return
    if config.get("class_name", "function") != "function":
        yield config["class_name"]
        yield config.get("registered_name") or config["class_name"]
    for value in config.values():
        yield from _class_names(value)
