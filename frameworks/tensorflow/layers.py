"""What a Keras model consists of, for pairing its layers with another framework's."""

from collections.abc import Iterator, Mapping
from typing import Any, Final

import keras

from lentando.comm.errors import ConfigurationError
from lentando.optimizers.checkpoint.layers import Layer, Tensor
from lentando.tensorflow.names import names_of
from lentando.tensorflow.state_variables import native

__all__ = ["layers"]

NORM = {
    "weight": ("gamma", "i"),
    "bias": ("beta", "i"),
    "mean": ("moving_mean", "i"),
    "variance": ("moving_variance", "i"),
}
KINDS: dict[Any, tuple[str, dict[str, tuple[str, str]]]] = {
    keras.layers.Dense: ("dense", {"weight": ("kernel", "io"), "bias": ("bias", "o")}),
    keras.layers.Conv1D: ("convolution", {"weight": ("kernel", "wio"), "bias": ("bias", "o")}),
    keras.layers.Conv2D: ("convolution", {"weight": ("kernel", "hwio"), "bias": ("bias", "o")}),
    keras.layers.Conv3D: ("convolution", {"weight": ("kernel", "dhwio"), "bias": ("bias", "o")}),
    keras.layers.BatchNormalization: ("batch norm", NORM),
    keras.layers.Embedding: ("embedding", {"weight": ("embeddings", "no")}),
}
"""By class: what it is, and for each role the attribute with its tensor and what the tensor's axes count."""

ELEMENTWISE = (
    keras.layers.Activation, keras.layers.ReLU, keras.layers.LeakyReLU, keras.layers.ELU, keras.layers.Dropout,
    keras.layers.SpatialDropout1D, keras.layers.SpatialDropout2D, keras.layers.SpatialDropout3D,
    keras.layers.GaussianNoise, keras.layers.GaussianDropout, keras.layers.ActivityRegularization,
    keras.layers.Rescaling, keras.layers.BatchNormalization, keras.layers.Identity,
)  # fmt: skip
"""Layers that leave features in their order."""
SPATIAL = (
    keras.layers.MaxPooling1D, keras.layers.MaxPooling2D, keras.layers.MaxPooling3D,
    keras.layers.AveragePooling1D, keras.layers.AveragePooling2D, keras.layers.AveragePooling3D,
    keras.layers.UpSampling1D, keras.layers.UpSampling2D, keras.layers.UpSampling3D,
    keras.layers.ZeroPadding1D, keras.layers.ZeroPadding2D, keras.layers.ZeroPadding3D,
    keras.layers.Conv1D, keras.layers.Conv2D, keras.layers.Conv3D,
    keras.layers.Conv1DTranspose, keras.layers.Conv2DTranspose, keras.layers.Conv3DTranspose,
    keras.layers.DepthwiseConv1D, keras.layers.DepthwiseConv2D,
    keras.layers.SeparableConv1D, keras.layers.SeparableConv2D,
)  # fmt: skip
"""Layers whose output is a map."""
PLACES = "dhw"

Axes = tuple[tuple[str, int], ...]
UNKNOWN: Final = "unknown"


def layers(model: keras.Model, names: Mapping[int, str] | None = None) -> list[Layer]:
    """The layers of a model that have weights, in the order of ``model.layers``.

    For ``Mapping.between``. Where that is not the order of the other model's, write the mapping by hand.

    Args:
        model: built, so that it has its weights.
        names: of its variables, by ``id`` of the ``tf.Variable``; those that the flat buffers use if not given.

    Raises:
        ConfigurationError: if it cannot be told in which order a dense layer's input features were flattened.
    """
    if names is None:
        trained = model.trainable_variables
        ids = {id(native(variable)) for variable in trained}
        variables = [*trained, *(v for v in model.weights if id(native(v)) not in ids)]
        names = dict(zip([id(native(v)) for v in variables], names_of(variables, model), strict=True))
    leaves = list(_leaves(model))
    graph = _Graph(leaves)
    found: list[Layer] = []
    channels: int | None = None  # of the map that the next layer may have been given flattened
    for layer in leaves:
        if not layer.weights:
            continue
        kind, roles = KINDS.get(type(layer), (type(layer).__name__, {}))
        tensors = {}
        for role, (attribute, axes) in roles.items():
            variable = getattr(layer, attribute, None)
            if variable is not None and id(native(variable)) in names:
                tensors[role] = Tensor(names[id(native(variable))], axes, tuple(variable.shape))
        if len(tensors) != len(layer.weights):
            kind, tensors = type(layer).__name__, {}
        flattened = graph.flattened(layer) if kind in ("dense", "batch norm") else None
        if flattened == UNKNOWN:
            weight = tensors["weight"]
            features = weight.shape[weight.axes.index("i")]
            if channels is not None and features != channels:
                raise ConfigurationError(
                    f"{layer.name!r} has {features} input features after a convolution of {channels} channels, and how "
                    "they were flattened cannot be told: use keras.layers.Flatten in a Sequential or functional model, "
                    "or give a mapping with a Rule that has split and merge"
                )
            flattened = None
        if kind == "convolution":
            channels = tensors["weight"].shape[-1]
        elif kind != "batch norm":
            channels = None
        found.append(Layer(layer.name, kind, tensors, flattened))
    return found


def _leaves(model: Any) -> Iterator[Any]:
    """The layers that compute, those of models within the model included."""
    for layer in model.layers:
        if isinstance(layer, keras.Model):
            yield from _leaves(layer)
        else:
            yield layer


class _Graph:
    """Which layer made which tensor, in Sequential and functional models."""

    def __init__(self, leaves: list[Any]) -> None:
        self._producers = {id(tensor): layer for layer in leaves if (tensor := _end(layer, "output")) is not None}

    def flattened(self, layer: Any) -> Any:
        """The map that a layer's input features were, None if they were none, or UNKNOWN."""
        tensor = _end(layer, "input")
        while tensor is not None:
            producer = self._producers.get(id(tensor))
            if producer is None:
                return UNKNOWN
            before = _end(producer, "input")
            if isinstance(producer, keras.layers.Flatten) and before is not None and len(before.shape) > 2:
                axes = self._axes(before)
                if axes in (None, UNKNOWN) or producer.data_format == "channels_last":
                    return axes
                return (*axes[1:], axes[0])  # Keras moves the first axis behind the others
            if not isinstance(producer, (*ELEMENTWISE, keras.layers.Flatten)):
                return None if producer.weights or isinstance(producer, keras.layers.InputLayer) else UNKNOWN
            tensor = before
        return UNKNOWN

    def _axes(self, tensor: Any) -> Any:
        """What each axis of a map counts and how long it is, without the batch; None if it is no map."""
        producer = self._producers.get(id(tensor))
        if isinstance(producer, keras.layers.Permute):
            axes = self._axes(_end(producer, "input"))
            return axes if axes in (None, UNKNOWN) else tuple(axes[axis - 1] for axis in producer.dims)
        if isinstance(producer, ELEMENTWISE):
            return self._axes(_end(producer, "input"))
        lengths = tuple(tensor.shape[1:])
        if isinstance(producer, SPATIAL):
            first = producer.data_format == "channels_first"
        elif producer is None or isinstance(producer, keras.layers.InputLayer):
            if len(lengths) < 3:  # a sequence, or an image without channels: flattened alike everywhere
                return None
            first = keras.config.image_data_format() == "channels_first"
        elif isinstance(producer, keras.layers.Embedding):
            return None
        else:
            return UNKNOWN
        places = PLACES[-(len(lengths) - 1) :]
        return tuple(zip("c" + places if first else places + "c", lengths, strict=True))


def _end(layer: Any, side: str) -> Any:
    """The one symbolic tensor at an end of a layer; None if there is none, or there are several."""
    try:
        tensor = getattr(layer, side)
    except (AttributeError, ValueError):  # never called symbolically, or called several times
        return None
    return tensor if hasattr(tensor, "shape") else None
