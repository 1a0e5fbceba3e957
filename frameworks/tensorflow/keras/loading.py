"""Loading of a saved Keras model, with its optimizer wrapped for training on all ranks."""

import inspect
from collections.abc import Callable, Iterable, Mapping
from types import FunctionType
from typing import Any

import keras

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.replica_optimizer import ReplicaOptimizer
from lentando.tensorflow.original_errors import convert_errors_of

__all__ = ["load_wrapped"]


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


def load_wrapped(
    filepath: Any,
    custom_optimizers: Iterable[type] | None,
    custom_objects: Mapping[str, Any] | None,
    wrap: Callable[[Any], Any],
) -> keras.Model:
    """Load a model, and wrap its optimizer, which keeps its state.

    Args:
        filepath: file of the model.
        custom_optimizers: classes of optimizers that are not Keras's own.
        custom_objects: further classes and functions, by name.
        wrap: function that wraps an optimizer.

    Raises:
        ConfigurationError: if the model was saved without an optimizer.
    """
    known = {optimizer.__name__: optimizer for optimizer in custom_optimizers or ()}
    known |= {name: _as_class(value) for name, value in (custom_objects or {}).items()}
    model = keras.saving.load_model(filepath, custom_objects=known)
    if getattr(model, "optimizer", None) is None:
        raise ConfigurationError(
            f"{filepath} contains a model without an optimizer (it was saved before compile): load it with "
            "keras.saving.load_model, and compile it with a DistributedOptimizer"
        )
    if not isinstance(model.optimizer, ReplicaOptimizer):
        model.optimizer = wrap(model.optimizer)
        convert_errors_of(model)
    return model


def _as_class(value: Any) -> Any:
    """A custom object as Keras takes it: functions that make an optimizer have keyword arguments of any name."""
    if not isinstance(value, FunctionType):
        return value
    kinds = {parameter.kind for parameter in inspect.signature(value).parameters.values()}
    return _Factory(value) if inspect.Parameter.VAR_KEYWORD in kinds else value
