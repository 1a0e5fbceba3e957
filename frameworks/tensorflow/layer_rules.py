"""The axis orders of the outputs of Keras layers and operations, given those of their inputs."""

from collections.abc import Sequence
from typing import Any

import keras

from lentando.tensorflow.axis_orders import AxisOrder, map_factors, map_layout
from lentando.tensorflow.feature_maps import data_format_of, is_output_image, map_format
from lentando.tensorflow.functional_graphs import FunctionalGraphs, sublayers, wrapped
from lentando.tensorflow.layer_classes import (
    BINARY,
    CHANNEL_NORMS,
    CONVOLUTIONS,
    ELEMENTWISE,
    GLOBAL_POOLING,
    LAST_AXIS_NORMS,
    MERGES,
    MOVES_OF_STEPS,
    RECURRENT,
    REDUCTIONS,
    RESHAPES,
    SPATIAL,
    UNARY,
    is_operation,
)
from lentando.tensorflow.traced_tensors import (
    TracedTensor,
    concatenated,
    flattened,
    joined,
    joined_groups,
    lengths_of,
    merged,
    order_of_channels,
    permuted,
    plain_tensor,
    reduced,
    unknown_tensor,
    with_ones_moved,
)

__all__ = ["LayerRules"]


L = keras.layers


class LayerRules:
    """Computes the output tensors of layers, and records the order of the features that each layer receives and makes.

    Args:
        graphs: the graphs of the model and of the layers in it.
        has_maps: whether the model is known to contain feature maps.

    Attributes:
        inputs: the order of the input features, by ``id`` of the layer.
        outputs: the order of the output features, by ``id`` of the layer.
        has_maps: whether feature maps have been found.
    """

    def __init__(self, graphs: FunctionalGraphs, has_maps: bool) -> None:
        self.inputs: dict[int, AxisOrder] = {}
        self.outputs: dict[int, AxisOrder] = {}
        self.has_maps = has_maps
        self._graphs = graphs

    def model_input(self, tensor: Any) -> TracedTensor:
        """An input of the whole model: a feature map if a layer uses it as one or if it has the shape of an image."""
        lengths = lengths_of(tensor)
        value = plain_tensor(lengths)
        data_format = map_format(self._graphs, tensor)
        if data_format is None and len(lengths) < 3:  # a sequence, or an image without channels: the same in PyTorch
            return value
        self.has_maps = True
        layout = map_layout(len(lengths), data_format or keras.config.image_data_format())
        return TracedTensor(value.axes, layout, is_map=True)

    def outputs_of(self, layer: Any, values: list[TracedTensor], tensors: list[Any]) -> list[TracedTensor]:
        """The outputs of a layer or operation that is not a model."""
        if isinstance(layer, RECURRENT):
            self._recurrent(layer, values)
            return [plain_tensor(lengths_of(tensor)) for tensor in tensors]
        if values and len(tensors) == 1:
            return [self._output(layer, values, tensors[0])]
        is_same = _same(values) and not _hides_layers(layer, values)
        made_of = [] if getattr(layer, "weights", None) else values
        return [plain_tensor(lengths_of(tensor)) if is_same else unknown_tensor(tensor, made_of) for tensor in tensors]

    def _output(self, layer: Any, values: list[TracedTensor], tensor: Any) -> TracedTensor:
        """The output of a layer or operation with one output."""
        value, lengths = values[0], lengths_of(tensor)
        name = type(layer).__name__ if is_operation(layer) else ""
        weighted = self._weighted(layer, values, lengths)
        if weighted is not None:
            return weighted
        if isinstance(layer, ELEMENTWISE) or name in UNARY:
            return value
        if isinstance(layer, SPATIAL):
            return self._spatial(layer, value, lengths, tensor)
        if isinstance(layer, GLOBAL_POOLING):
            return reduced(value, _places(len(value.axes), layer.data_format), lengths)
        if isinstance(layer, L.Flatten):
            return flattened(value, layer.data_format)
        if isinstance(layer, L.Reshape) or name in RESHAPES:
            return self._reshaped(value, lengths, tensor)
        if isinstance(layer, L.Permute) or (name == "Transpose" and layer.axes and layer.axes[0] == 0):
            axes = layer.dims if isinstance(layer, L.Permute) else layer.axes[1:]
            return permuted(value, [axis - 1 for axis in axes])
        if isinstance(layer, L.Concatenate) or name == "Concatenate":
            return concatenated(values, _axis(layer.axis, len(lengths)), lengths)
        if isinstance(layer, MERGES) or name in BINARY:
            return merged(values, lengths)
        if name in REDUCTIONS and layer.axis is not None:
            axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
            return reduced(value, [_axis(axis, len(value.axes)) for axis in axes], lengths)
        if _same(values) and not _hides_layers(layer, values):
            return plain_tensor(lengths)  # equal inputs give equal outputs in PyTorch
        if name == "GetItem" and value.make_plain():
            return TracedTensor(tuple(map(AxisOrder.plain, lengths)), (0,) if len(lengths) == 1 else None)
        return unknown_tensor(tensor, [] if getattr(layer, "weights", None) else values)

    def _weighted(self, layer: Any, values: list[TracedTensor], lengths: list[int | None]) -> TracedTensor | None:
        """The output of a layer with weights, whose features are recorded; None for any other layer."""
        value, rank = values[0], len(lengths)
        if isinstance(layer, L.TimeDistributed) and isinstance(layer.layer, L.Dense):
            layer = layer.layer
        if isinstance(layer, L.Dense):
            self._note_input(layer, value.axes[-1])
            return TracedTensor((*value.axes[:-1], self._output_order(layer, lengths[-1])), value.after_features_last)
        if isinstance(layer, CHANNEL_NORMS):
            order = order_of_channels(value.axes[_axis(layer.axis, rank)], rank)
            is_grouped = isinstance(layer, L.GroupNormalization) and layer.groups not in (1, -1, order.length)
            self._note_input(layer, AxisOrder.unknown(None) if is_grouped and not order.make_plain() else order)
            is_moved = rank > 1 and not value.is_map  # here PyTorch has channels before the steps of a sequence
            return TracedTensor(value.axes, None if is_moved else value.layout, value.is_map)
        if isinstance(layer, LAST_AXIS_NORMS) and _axes(layer.axis, rank) == [rank - 1]:
            self._note_input(layer, value.axes[-1])
            return TracedTensor(value.axes, value.after_features_last)
        if isinstance(layer, L.MultiHeadAttention):
            plain = [argument.make_plain() for argument in values]
            self._note_input(layer, AxisOrder.plain(None) if all(plain) else AxisOrder.unknown(None))
            return TracedTensor((*value.axes[:-1], AxisOrder.plain(lengths[-1])), value.after_features_last)
        if isinstance(layer, L.Embedding):
            return TracedTensor((*value.axes, self._output_order(layer, lengths[-1])), tuple(range(rank)))
        if isinstance(layer, L.PReLU):
            self._note_input(layer, order_of_channels(value.axes[-1], rank))
        return None

    def _note_input(self, layer: Any, order: AxisOrder) -> None:
        known = self.inputs.get(id(layer))
        self.inputs[id(layer)] = order if known is None else known.merged(order)

    def _output_order(self, layer: Any, length: int | None) -> AxisOrder:
        return self.outputs.setdefault(id(layer), AxisOrder(length))

    def _spatial(self, layer: Any, value: TracedTensor, lengths: list[int | None], tensor: Any) -> TracedTensor:
        self.has_maps = True
        channels = 0 if data_format_of(layer) == "channels_first" else len(lengths) - 1
        axes = list(map(AxisOrder.plain, lengths))
        is_mixed = any(axis.segments() is not None and not axis.make_plain() for axis in _without(value.axes, channels))
        if isinstance(layer, CONVOLUTIONS):
            known = AxisOrder.unknown(None) if is_mixed else order_of_channels(value.axes[channels], len(lengths))
            self._note_input(layer, known)
            axes[channels] = self.outputs.setdefault(id(layer), AxisOrder.plain(lengths[channels]))
        elif is_mixed:  # elements that are neighbors here are not neighbors in PyTorch
            return unknown_tensor(tensor)
        else:
            axes[channels] = value.axes[channels]
        if isinstance(layer, MOVES_OF_STEPS) and not value.is_map:
            return TracedTensor(tuple(axes), None)
        return TracedTensor(tuple(axes), map_layout(len(lengths), data_format_of(layer)), is_map=True)

    def _recurrent(self, layer: Any, values: list[TracedTensor]) -> None:
        inner = wrapped(layer) or (layer,)
        plain = [*(axis.make_plain() for axis in values[0].axes[:-1]), *(value.make_plain() for value in values[1:])]
        for direction in inner:
            self._note_input(direction, values[0].axes[-1] if all(plain) else AxisOrder.unknown(None))

    def _reshaped(self, value: TracedTensor, lengths: list[int | None], tensor: Any) -> TracedTensor:
        plain = tuple(map(AxisOrder.plain, lengths))
        same = tuple(range(len(lengths)))
        big = [number for number, length in enumerate(lengths) if length != 1]
        if [value.lengths[axis] for axis in value.big_axes] == [lengths[axis] for axis in big]:
            return with_ones_moved(value, big, plain)
        data_format = map_format(self._graphs, tensor)
        if len(value.big_axes) == 1:
            return self._unflattened(value.axes[value.big_axes[0]], lengths, tensor, data_format)
        groups = joined_groups(value.lengths, lengths)
        if groups is not None:
            axes = tuple(joined(value, group) for group in groups)
            if data_format is not None:
                return TracedTensor(axes, map_layout(len(lengths), data_format), is_map=True)
            is_same = value.layout == tuple(range(len(value.axes))) and not value.is_map
            return TracedTensor(axes, same if is_same or len(lengths) == 1 else None)
        if value.lengths[-1] == lengths[-1] and value.make_plain():
            if data_format is not None:
                return TracedTensor(plain, map_layout(len(lengths), data_format), is_map=True)
            return TracedTensor(plain, same if value.make_same() and not value.is_map else None)
        return plain_tensor(lengths) if value.make_same() and not value.is_map else unknown_tensor(tensor, [value])

    def _unflattened(
        self, order: AxisOrder, lengths: list[int | None], tensor: Any, data_format: str | None
    ) -> TracedTensor:
        """A reshaped vector: a feature map if it is used as one, or if it is an image that the model generates."""
        if data_format is None and len(lengths) == 2:
            return plain_tensor(lengths) if order.constrain((("n", order.length or 0),)) else unknown_tensor(tensor)
        self.has_maps = True
        layout = map_layout(len(lengths), data_format or keras.config.image_data_format())
        factors = map_factors(lengths, layout, range(len(lengths)))
        if factors is None or (data_format is None and not is_output_image(self._graphs, tensor)):
            order.forget()
        elif order.constrain(factors):
            return TracedTensor(tuple(map(AxisOrder.plain, lengths)), layout, is_map=True)
        return unknown_tensor(tensor)


def _places(rank: int, data_format: str) -> range:
    return range(1, rank) if data_format == "channels_first" else range(rank - 1)


def _same(values: Sequence[TracedTensor]) -> bool:
    same = [value.make_same() for value in values]
    return all(same)


def _hides_layers(layer: Any, values: Sequence[TracedTensor]) -> bool:
    """Whether this is the user's own code, which could not be traced and may contain feature maps."""
    if isinstance(layer, L.Lambda):
        return any(len(value.axes) > 1 for value in values)
    return isinstance(layer, L.Layer) and (not type(layer).__module__.startswith("keras.") or bool(sublayers(layer)))


def _without(axes: Sequence[AxisOrder], number: int) -> list[AxisOrder]:
    return [axis for place, axis in enumerate(axes) if place != number]


def _axes(axes: Any, rank: int) -> list[int]:
    """Numbers of axes, from 0 and without the batch axis, given those of Keras."""
    return [axis - 1 if axis > 0 else rank + axis for axis in (axes if isinstance(axes, list | tuple) else [axes])]


def _axis(axis: int, rank: int) -> int:
    return _axes(axis, rank)[0]
