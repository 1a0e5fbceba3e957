"""Follows the graph of a Keras model, to find in which order its layers' features come in PyTorch.

PyTorch's feature maps have channels first, Keras's last. So the features of a map that is flattened, or of a vector
that is reshaped to a map, come in another order, and the weights along such axes must be permuted, in part if other
features are concatenated. Where neither that nor the same order is certain, the order is unknown.
"""

import re
import sys
from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import keras

from lentando.comm.errors import ConfigurationError
from lentando.tensorflow.orders import (
    Order,
    Value,
    flattened,
    joined,
    map_factors,
    map_layout,
    merged,
    origins_of,
    plain_value,
)
from lentando.tensorflow.tracing import Functions, sublayers, wrapped

__all__ = ["FeatureOrders"]

L = keras.layers

ELEMENTWISE = (
    L.Activation, L.ReLU, L.LeakyReLU, L.ELU, L.Softmax, L.Dropout, L.AlphaDropout, L.SpatialDropout1D,
    L.SpatialDropout2D, L.SpatialDropout3D, L.GaussianNoise, L.GaussianDropout, L.ActivityRegularization, L.Rescaling,
    L.Identity, L.PReLU, L.Masking,
)  # fmt: skip
CHANNEL_NORMS = (L.BatchNormalization, L.GroupNormalization)
LAST_AXIS_NORMS = (L.LayerNormalization, L.RMSNormalization)
MERGES = (L.Add, L.Subtract, L.Multiply, L.Average, L.Maximum, L.Minimum)
CONVOLUTIONS = (
    L.Conv1D, L.Conv2D, L.Conv3D, L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose, L.DepthwiseConv1D,
    L.DepthwiseConv2D, L.SeparableConv1D, L.SeparableConv2D,
)  # fmt: skip
SPATIAL = (
    *CONVOLUTIONS,
    L.MaxPooling1D, L.MaxPooling2D, L.MaxPooling3D, L.AveragePooling1D, L.AveragePooling2D, L.AveragePooling3D,
    L.UpSampling1D, L.UpSampling2D, L.UpSampling3D, L.ZeroPadding1D, L.ZeroPadding2D, L.ZeroPadding3D, L.Cropping1D,
    L.Cropping2D, L.Cropping3D,
)  # fmt: skip
GLOBAL_POOLING = (
    L.GlobalAveragePooling1D, L.GlobalAveragePooling2D, L.GlobalAveragePooling3D,
    L.GlobalMaxPooling1D, L.GlobalMaxPooling2D, L.GlobalMaxPooling3D,
)  # fmt: skip
RECURRENT = (L.LSTM, L.GRU, L.SimpleRNN, L.Bidirectional)
MOVES_OF_STEPS = (L.ZeroPadding1D, L.Cropping1D, L.UpSampling1D)
"""In PyTorch they are functions of tensors with channels first, or of sequences with features last."""
SEQUENCE_POOLING = (L.GlobalAveragePooling1D, L.GlobalMaxPooling1D)

# Operations of keras.ops, by the names of their classes.
UNARY = {
    "Relu", "Relu6", "LeakyRelu", "Elu", "Selu", "Celu", "Gelu", "Silu", "Sigmoid", "HardSigmoid", "HardSilu",
    "LogSigmoid", "Softplus", "Softsign", "Softmax", "LogSoftmax", "Tanh", "Exp", "Log", "Sqrt", "Rsqrt", "Square",
    "Absolute", "Negative", "Sin", "Cos", "Clip", "Sign", "Cast", "StopGradient", "Erf", "Mish",
}  # fmt: skip
BINARY = {"Add", "Subtract", "Multiply", "TrueDivide", "Divide", "Maximum", "Minimum", "Power"}
REDUCTIONS = {"Mean", "Max", "Min", "Sum", "Amax", "Amin"}
RESHAPES = {"Reshape", "ExpandDims", "Squeeze", "Flatten"}


NUMBERED = re.compile(r"keras_tensor(?:_(\d+))?")
"""How Keras names the outputs of layers, counting calls."""


class FeatureOrders:
    """The orders of a model's features.

    Args:
        model: the model, with its weights.
        leaves: the layers of which the orders are wanted.

    Attributes:
        inputs: the order of a layer's input features, by ``id`` of the layer.
        outputs: the same of output features.
        ancestors: the ``id`` of every layer whose results reach a layer, by ``id`` of that layer.
        calls: a number by which layers can be sorted as they were called first, by ``id`` of the layer.
        has_maps: whether there are feature maps in the model.
    """

    def __init__(self, model: Any, leaves: Iterable[Any]) -> None:
        self.inputs: dict[int, Order] = {}
        self.outputs: dict[int, Order] = {}
        self.has_maps = any(isinstance(layer, (*SPATIAL, *GLOBAL_POOLING, L.Flatten)) for layer in leaves)
        self.ancestors: dict[int, set[int]] = {}
        self.calls: dict[int, int] = {}
        self._functions = Functions()
        function = self._functions.of_model(model)
        if function is None:
            self.has_maps |= self._functions.takes_images(model)
        else:
            try:
                for value, _ in self._run(function, None, []):
                    if len(value.axes) > 1:  # an image that the model makes, perhaps of the channels of another
                        _certain(value.axes[_channels(value)], len(value.axes))
            except Exception as error:  # whatever a user's layer raises when it is asked: saving needs no description
                raise ConfigurationError(
                    f"what the model consists of could not be determined: following its layers ended in "
                    f"{type(error).__name__}: {error}"
                ) from error

    def _run(
        self, function: Any, given: Sequence[Value] | None, origins: Sequence[set[int]]
    ) -> list[tuple[Value, set[int]]]:
        """Follow all layers of a functional model.

        Args:
            function: the model.
            given: what its inputs are; None for those of the whole model.
            origins: the layers whose results have reached each input.

        Returns:
            What its outputs are, and the layers whose results have reached each.
        """
        values: dict[int, Value] = {}
        reached: dict[int, set[int]] = {}
        inputs = self._functions.inputs(function)
        for number, tensor in enumerate(inputs):
            values[id(tensor)] = self._input(tensor) if given is None else given[number]
            reached[id(tensor)] = origins[number] if given is not None else set()
        pending = self._functions.nodes(function)
        while pending:
            later = []
            for node in pending:
                if all(id(tensor) in values for tensor in node.input_tensors):
                    before = [reached[id(tensor)] for tensor in node.input_tensors]
                    found = self._outputs(node, [values[id(tensor)] for tensor in node.input_tensors], before)
                    for tensor, (value, after) in zip(node.output_tensors, found, strict=True):
                        values[id(tensor)], reached[id(tensor)] = value, after
                else:
                    later.append(node)
            if len(later) == len(pending):  # those that are left belong to other models with the same layers
                break
            pending = later
        outputs = self._functions.outputs(function)
        return [(values.get(id(tensor)) or _unknown(tensor), reached.get(id(tensor), set())) for tensor in outputs]

    def _input(self, tensor: Any) -> Value:
        lengths = _lengths(tensor)
        value = plain_value(lengths)
        data_format = self._map_format(tensor)
        if data_format is None and len(lengths) < 3:  # a sequence, or an image without channels: the same everywhere
            return value
        self.has_maps = True
        layout = map_layout(len(lengths), data_format or keras.config.image_data_format())
        return Value(value.axes, layout, is_map=True)

    def _outputs(self, node: Any, values: list[Value], before: list[set[int]]) -> list[tuple[Value, set[int]]]:
        """What a layer or an operation makes of values, and the layers whose results reach that."""
        layer, tensors = node.operation, node.output_tensors
        all_before = set().union(*before)
        self.ancestors.setdefault(id(layer), set()).update(all_before)
        after = all_before | {id(own) for own in (layer, *wrapped(layer))}
        for previous, own in pairwise((None, *wrapped(layer))):  # the directions of a recurrent layer have an order
            known = self.ancestors.setdefault(id(own), set())
            known.update(all_before if previous is None else {*all_before, id(previous)})
        numbers = [int(named[1] or 0) for tensor in tensors if (named := NUMBERED.fullmatch(tensor.name))]
        self.calls[id(layer)] = min([self.calls.get(id(layer), sys.maxsize), *numbers])
        function = self._functions.within(node)
        if function is not None:
            inner = self._functions.inputs(function)
            if [_lengths(tensor) for tensor in inner] != [value.lengths for value in values]:
                values, before = [_unknown(tensor) for tensor in inner], [all_before] * len(inner)
            found = [(value, after | reached) for value, reached in self._run(function, values, before)]
            return found if len(found) == len(tensors) else [(_unknown(tensor), after) for tensor in tensors]
        return [(value, after) for value in self._values(layer, values, tensors)]

    def _values(self, layer: Any, values: list[Value], tensors: list[Any]) -> list[Value]:
        """What a layer or an operation that is no model makes of values."""
        if isinstance(layer, RECURRENT):
            self._recurrent(layer, values)
            return [plain_value(_lengths(tensor)) for tensor in tensors]
        if values and len(tensors) == 1:
            return [self._output(layer, values, tensors[0])]
        is_same = _same(values) and not _hides_layers(layer, values)
        made_of = [] if getattr(layer, "weights", None) else values
        return [plain_value(_lengths(tensor)) if is_same else _unknown(tensor, made_of) for tensor in tensors]

    def _output(self, layer: Any, values: list[Value], tensor: Any) -> Value:
        """What a layer or an operation with one output makes of values: a table of those that are known."""
        value, lengths = values[0], _lengths(tensor)
        name = type(layer).__name__ if _is_operation(layer) else ""
        weighted = self._weighted(layer, values, lengths)
        if weighted is not None:
            return weighted
        if isinstance(layer, ELEMENTWISE) or name in UNARY:
            return value
        if isinstance(layer, SPATIAL):
            return self._spatial(layer, value, lengths, tensor)
        if isinstance(layer, GLOBAL_POOLING):
            return _reduced(value, _places(len(value.axes), layer.data_format), lengths)
        if isinstance(layer, L.Flatten):
            return flattened(value, layer.data_format)
        if isinstance(layer, L.Reshape) or name in RESHAPES:
            return self._reshaped(value, lengths, tensor)
        if isinstance(layer, L.Permute) or (name == "Transpose" and layer.axes and layer.axes[0] == 0):
            axes = layer.dims if isinstance(layer, L.Permute) else layer.axes[1:]
            return _permuted(value, [axis - 1 for axis in axes])
        if isinstance(layer, L.Concatenate) or name == "Concatenate":
            return _concatenated(values, _axis(layer.axis, len(lengths)), lengths)
        if isinstance(layer, MERGES) or name in BINARY:
            return merged(values, lengths)
        if name in REDUCTIONS and layer.axis is not None:
            axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
            return _reduced(value, [_axis(axis, len(value.axes)) for axis in axes], lengths)
        if _same(values) and not _hides_layers(layer, values):
            return plain_value(lengths)  # PyTorch does the same with the same
        if name == "GetItem" and value.make_plain():
            return Value(tuple(map(Order.plain, lengths)), (0,) if len(lengths) == 1 else None)
        return _unknown(tensor, [] if getattr(layer, "weights", None) else values)

    def _weighted(self, layer: Any, values: list[Value], lengths: list[int | None]) -> Value | None:
        """What a layer with weights makes of values, None if it is none; notes which features it is given and makes."""
        value, rank = values[0], len(lengths)
        if isinstance(layer, L.TimeDistributed) and isinstance(layer.layer, L.Dense):
            layer = layer.layer
        if isinstance(layer, L.Dense):
            self._takes(layer, value.axes[-1])
            return Value((*value.axes[:-1], self._made(layer, lengths[-1])), value.after_features_last)
        if isinstance(layer, CHANNEL_NORMS):
            order = _certain(value.axes[_axis(layer.axis, rank)], rank)
            mixes = isinstance(layer, L.GroupNormalization) and layer.groups not in (1, -1, order.length)
            self._takes(layer, Order.unknown(None) if mixes and not order.make_plain() else order)
            moves = rank > 1 and not value.is_map  # PyTorch has channels before the steps of a sequence there
            return Value(value.axes, None if moves else value.layout, value.is_map)
        if isinstance(layer, LAST_AXIS_NORMS) and _axes(layer.axis, rank) == [rank - 1]:
            self._takes(layer, value.axes[-1])
            return Value(value.axes, value.after_features_last)
        if isinstance(layer, L.MultiHeadAttention):
            plain = [own.make_plain() for own in values]
            self._takes(layer, Order.plain(None) if all(plain) else Order.unknown(None))
            return Value((*value.axes[:-1], Order.plain(lengths[-1])), value.after_features_last)
        if isinstance(layer, L.Embedding):
            return Value((*value.axes, self._made(layer, lengths[-1])), tuple(range(rank)))
        if isinstance(layer, L.PReLU):
            self._takes(layer, _certain(value.axes[-1], rank))
        return None

    def _takes(self, layer: Any, order: Order) -> None:
        known = self.inputs.get(id(layer))
        self.inputs[id(layer)] = order if known is None else known.merged(order)

    def _made(self, layer: Any, length: int | None) -> Order:
        return self.outputs.setdefault(id(layer), Order(length))

    def _spatial(self, layer: Any, value: Value, lengths: list[int | None], tensor: Any) -> Value:
        self.has_maps = True
        channels = 0 if _data_format(layer) == "channels_first" else len(lengths) - 1
        axes = list(map(Order.plain, lengths))
        is_mixed = any(axis.segments() is not None and not axis.make_plain() for axis in _without(value.axes, channels))
        if isinstance(layer, CONVOLUTIONS):
            known = Order.unknown(None) if is_mixed else _certain(value.axes[channels], len(lengths))
            self._takes(layer, known)
            axes[channels] = self.outputs.setdefault(id(layer), Order.plain(lengths[channels]))
        elif is_mixed:  # neighbours here are no neighbours in PyTorch
            return _unknown(tensor)
        else:
            axes[channels] = value.axes[channels]
        if isinstance(layer, MOVES_OF_STEPS) and not value.is_map:
            return Value(tuple(axes), None)
        return Value(tuple(axes), map_layout(len(lengths), _data_format(layer)), is_map=True)

    def _recurrent(self, layer: Any, values: list[Value]) -> None:
        inner = wrapped(layer) or (layer,)
        plain = [*(axis.make_plain() for axis in values[0].axes[:-1]), *(value.make_plain() for value in values[1:])]
        for own in inner:
            self._takes(own, values[0].axes[-1] if all(plain) else Order.unknown(None))

    def _reshaped(self, value: Value, lengths: list[int | None], tensor: Any) -> Value:
        plain = tuple(map(Order.plain, lengths))
        same = tuple(range(len(lengths)))
        big = [number for number, length in enumerate(lengths) if length != 1]
        if [value.lengths[axis] for axis in value.big_axes] == [lengths[axis] for axis in big]:
            return _with_other_ones(value, big, plain)
        data_format = self._map_format(tensor)
        if len(value.big_axes) == 1:
            return self._unflattened(value.axes[value.big_axes[0]], lengths, tensor, data_format)
        groups = _groups(value.lengths, lengths)
        if groups is not None:
            axes = tuple(joined(value, group) for group in groups)
            if data_format is not None:
                return Value(axes, map_layout(len(lengths), data_format), is_map=True)
            is_same = value.layout == tuple(range(len(value.axes))) and not value.is_map
            return Value(axes, same if is_same or len(lengths) == 1 else None)
        if value.lengths[-1] == lengths[-1] and value.make_plain():
            if data_format is not None:
                return Value(plain, map_layout(len(lengths), data_format), is_map=True)
            return Value(plain, same if value.make_same() and not value.is_map else None)
        return plain_value(lengths) if value.make_same() and not value.is_map else _unknown(tensor, [value])

    def _unflattened(self, order: Order, lengths: list[int | None], tensor: Any, data_format: str | None) -> Value:
        """A vector that is reshaped: to a feature map if it is used as one or is an image that the model makes."""
        if data_format is None and len(lengths) == 2:
            return plain_value(lengths) if order.constrain((("n", order.length or 0),)) else _unknown(tensor)
        self.has_maps = True
        layout = map_layout(len(lengths), data_format or keras.config.image_data_format())
        factors = map_factors(lengths, layout, range(len(lengths)))
        if factors is None or (data_format is None and not self._is_output(tensor)):
            order.forget()
        elif order.constrain(factors):
            return Value(tuple(map(Order.plain, lengths)), layout, is_map=True)
        return _unknown(tensor)

    def _is_output(self, tensor: Any) -> bool:
        """Whether nothing but functions of single elements use a tensor."""
        users = self._functions.users(tensor)
        return all(
            (isinstance(node.operation, ELEMENTWISE) or type(node.operation).__name__ in UNARY)
            and all(map(self._is_output, node.output_tensors))
            for node in users
        )

    def _map_format(self, tensor: Any) -> str | None:
        """The data format of the layer that uses a tensor as a feature map, perhaps after others that keep its form."""
        seen: set[int] = set()
        waiting = [tensor]
        while waiting:
            tensor = waiting.pop()
            for node in self._functions.users(tensor):
                if id(node) in seen:
                    continue
                seen.add(id(node))
                layer = node.operation
                if isinstance(layer, (*SPATIAL, *GLOBAL_POOLING)) and not isinstance(
                    layer, (*SEQUENCE_POOLING, *MOVES_OF_STEPS)
                ):
                    return str(layer.data_format)
                function = self._functions.within(node)
                if function is not None:
                    places = [number for number, own in enumerate(node.input_tensors) if own is tensor]
                    self._functions.nodes(function)
                    waiting += [self._functions.inputs(function)[place] for place in places]
                elif isinstance(layer, (*ELEMENTWISE, *CHANNEL_NORMS, *MERGES, *MOVES_OF_STEPS, L.Concatenate)) or (
                    _is_operation(layer) and type(layer).__name__ in UNARY | BINARY | {"Concatenate"}
                ):
                    waiting += node.output_tensors
        return None


def _data_format(layer: Any) -> str:
    """Keras's layers for sequences that have none work on sequences with channels last."""
    return str(getattr(layer, "data_format", "channels_last"))


def _lengths(tensor: Any) -> list[int | None]:
    return list(tensor.shape[1:])


def _unknown(tensor: Any, values: Sequence[Value] = ()) -> Value:
    """A tensor of which nothing is known.

    Args:
        tensor: the tensor.
        values: that it was made of without any weights, so that its channels may be those of these.
    """
    origins = origins_of([value.axes[_channels(value)] for value in values if len(value.axes) > 1])
    return Value(tuple(Order.unknown(length, origins) for length in _lengths(tensor)), None)


def _channels(value: Value) -> int:
    """Which axis has the channels, if the tensor is a feature map; the last one otherwise."""
    return value.layout[0] if value.is_map and value.layout is not None else len(value.axes) - 1


def _certain(order: Order, rank: int) -> Order:
    """The order of channels: plain in a map, unless channels were made of places, or places of channels.

    Those that become places (``depth_to_space``) come in another order in PyTorch, and become unknown.
    """
    if rank == 1 or order.segments() is not None:
        return order
    lengths = [origin.length for origin in order.root.origins]
    if not lengths or order.length in (*lengths, sum(length or 0 for length in lengths)):
        return Order.plain(order.length)
    for origin in order.root.origins:
        origin.forget()
    return order


def _same(values: Sequence[Value]) -> bool:
    same = [value.make_same() for value in values]
    return all(same)


def _hides_layers(layer: Any, values: Sequence[Value]) -> bool:
    """Whether this is the user's own code that could not be followed: feature maps may come and go in it."""
    if isinstance(layer, L.Lambda):
        return any(len(value.axes) > 1 for value in values)
    return isinstance(layer, L.Layer) and (not type(layer).__module__.startswith("keras.") or bool(sublayers(layer)))


def _without(axes: Sequence[Order], number: int) -> list[Order]:
    return [axis for place, axis in enumerate(axes) if place != number]


def _is_operation(layer: Any) -> bool:
    """Whether this is an operation of keras.ops."""
    return type(layer).__module__.startswith("keras.src.ops")


def _axes(axes: Any, rank: int) -> list[int]:
    """The numbers of axes without the batch."""
    return [axis - 1 if axis > 0 else rank + axis for axis in (axes if isinstance(axes, list | tuple) else [axes])]


def _axis(axis: int, rank: int) -> int:
    return _axes(axis, rank)[0]


def _groups(lengths: Sequence[int | None], wanted: Sequence[int | None]) -> list[list[int]] | None:
    """Which neighbouring axes are joined to make axes of these lengths; None if some would have to be split."""
    groups: list[list[int]] = []
    axis = 0
    for length in wanted:
        group: list[int] = []
        product = 1
        while axis < len(lengths) and (product != length or lengths[axis] == 1):
            own = lengths[axis]
            if own is None:
                return None
            product *= own
            group.append(axis)
            axis += 1
        if product != length:
            return None
        groups.append(group)
    return groups if axis == len(lengths) else None


def _with_other_ones(value: Value, big: Sequence[int], plain: tuple[Order, ...]) -> Value:
    """The same axes, with axes of length 1 at other places."""
    moved = dict(zip(value.big_axes, big, strict=True))
    same = tuple(range(len(plain)))
    origin = {new: value.axes[old] for old, new in moved.items()}
    axes = tuple(origin.get(number, order) for number, order in enumerate(plain))
    if len(big) <= 1:
        return Value(axes, same)
    if value.layout is None or value.layout == tuple(range(len(value.axes))):
        return Value(axes, value.layout and same, value.is_map)
    layout = [moved[axis] for axis in value.layout if axis in moved]
    return Value(axes, (*layout, *(axis for axis in same if axis not in big)), value.is_map)


def _places(rank: int, data_format: str) -> range:
    return range(1, rank) if data_format == "channels_first" else range(rank - 1)


def _permuted(value: Value, axes: Sequence[int]) -> Value:
    orders = tuple(value.axes[axis] for axis in axes)
    same = tuple(range(len(axes)))
    if not value.is_map:
        return Value(orders, same if value.layout == same else None)
    layout = None if value.layout is None else tuple(axes.index(axis) for axis in value.layout)
    return Value(orders, layout, is_map=True)


def _concatenated(values: Sequence[Value], axis: int, lengths: Sequence[int | None]) -> Value:
    if len({len(value.axes) for value in values}) > 1:
        return Value(tuple(map(Order.unknown, lengths)), None)
    others = [number for number in range(len(lengths)) if number != axis]
    alike = merged(
        [Value(tuple(value.axes[number] for number in others), None) for value in values],
        [lengths[number] for number in others],
    )
    parts = Order(lengths[axis], parts=[value.axes[axis] for value in values])
    layouts = {(value.layout, value.is_map) for value in values}
    layout, is_map = layouts.pop() if len(layouts) == 1 else (None, False)
    return Value((*alike.axes[:axis], parts, *alike.axes[axis:]), layout, is_map)


def _reduced(value: Value, gone: Iterable[int], lengths: Sequence[int | None]) -> Value:
    """Without some axes, or with length 1 in their place."""
    kept = [axis for axis in range(len(value.axes)) if axis not in set(gone)]
    if len(lengths) == len(value.axes):
        axes = tuple(own if n in kept else Order.plain(1) for n, own in enumerate(value.axes))
        return Value(axes, value.layout, value.is_map)
    layout = None if value.layout is None else tuple(kept.index(axis) for axis in value.layout if axis in kept)
    return Value(tuple(value.axes[axis] for axis in kept), layout if len(kept) != 1 else (0,), value.is_map)
