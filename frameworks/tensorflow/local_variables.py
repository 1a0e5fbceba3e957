"""Variables that every rank has for itself, such as its part of a large embedding, and that are not averaged."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.tensorflow.state_variables import native

__all__ = ["LocalVariables", "variables_of_layers"]


class LocalVariables:
    """The local variables of an optimizer or a tape, and what happens to their gradients.

    Args:
        size: function that returns the number of ranks.
        are_scaled: whether their gradients are divided by the number of ranks. The loss of a rank then has the weight
            that it has in the mean over the ranks, whose gradient the other variables get.
    """

    def __init__(self, size: Callable[[], int], are_scaled: bool) -> None:
        self._size = size
        self._are_scaled = are_scaled
        self._variables: dict[int, Any] = {}

    def __bool__(self) -> bool:
        return bool(self._variables)

    def __contains__(self, variable: Any) -> bool:
        return id(native(variable)) in self._variables

    def register(self, variable: Any) -> None:
        """Add a variable that this rank has for itself."""
        self._variables[id(native(variable))] = variable

    def shared(self, variables: Sequence[Any]) -> list[Any]:
        """The other ones of some variables."""
        return [variable for variable in variables if variable not in self]

    def gradient(self, gradient: Any) -> Any:
        """The gradient with which a local variable is updated, from that of this rank's loss; None if there is none."""
        if gradient is None or not self._are_scaled:
            return gradient
        if isinstance(gradient, tf.IndexedSlices):
            return tf.IndexedSlices(gradient.values / self._size(), gradient.indices, gradient.dense_shape)
        return gradient / self._size()


def variables_of_layers(layers: keras.layers.Layer | Iterable[keras.layers.Layer] | None) -> list[Any]:
    """The trainable variables of layers that every rank has for itself.

    Args:
        layers: a layer, several, or None. They have been built: a layer has no variables before that.

    Raises:
        ConfigurationError: for anything but layers, and for layers that have not been built.
    """
    listed = [layers] if isinstance(layers, keras.layers.Layer) else list(layers or ())
    for layer in listed:
        if not isinstance(layer, keras.layers.Layer):
            raise ConfigurationError(f"local_layers must be Keras layers, got {type(layer).__name__}")
        if not layer.built:
            raise ConfigurationError(f"layer {layer.name!r} of local_layers has not been built: build the model first")
    return [variable for layer in listed for variable in layer.trainable_variables]
