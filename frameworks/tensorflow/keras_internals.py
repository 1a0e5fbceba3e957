"""Everything that is read from Keras by a private name, because no public API provides it."""

from collections.abc import Sequence
from typing import Any

__all__ = ["calls_of", "learning_rate_setting", "moving_averages", "tracked_layers"]

# ruff: noqa: SLF001


def learning_rate_setting(optimizer: Any) -> Any:
    """The learning rate as it was given to a Keras optimizer: a variable, a schedule or a function.

    ``optimizer.learning_rate`` is the value that a schedule gives for the next step. ``get_config`` contains the
    schedule, but in serialized form: it raises an error for a schedule or function that cannot be saved.
    """
    return optimizer._learning_rate


def tracked_layers(layer: Any) -> list[Any]:
    """The layers that a layer holds. Only models have a public list of them, ``Model.layers``."""
    return list(layer._layers)


def calls_of(operation: Any) -> Sequence[Any]:
    """The calls of a layer or operation in all graphs: nodes with input and output tensors.

    ``Operation.input`` and ``Operation.output`` exist for an operation that was called once, and omit the arguments.
    """
    nodes: Sequence[Any] = operation._inbound_nodes
    return nodes


def moving_averages(optimizer: Any) -> Any:
    """The moving averages of the weights that an optimizer keeps with ``use_ema=True``, in the order of the weights.

    ``optimizer.variables`` contains them without saying which of the variables they are.
    """
    return optimizer._model_variables_moving_average
