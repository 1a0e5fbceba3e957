"""What a Keras model consists of, for pairing its layers with another framework's."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import keras

from lentando.optimizers.checkpoint.layers import Layer, Segment, Tensor
from lentando.tensorflow.feature_orders import FeatureOrders
from lentando.tensorflow.names import names_of
from lentando.tensorflow.orders import Order
from lentando.tensorflow.state_variables import native
from lentando.tensorflow.tracing import is_functional, sublayers, wrapped

__all__ = ["layers"]

L = keras.layers


@dataclass(frozen=True)
class _Description:
    """What is said about a layer, but for the names of its variables.

    Attributes:
        kind: see ``Layer``.
        roles: for each role the variable and what its axes count; with the first index and the index after the last of
            its first axis, where that is only a part.
        structure, settings, lengths, orders: see ``Layer``.
        name: of the layer, if it is not the Keras layer's.
    """

    kind: str
    roles: Mapping[str, tuple[Any, ...]]
    structure: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    orders: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    suffix: str = ""


def layers(model: keras.Model, names: Mapping[int, str] | None = None) -> list[Layer]:
    """The layers of a model that have weights, in the order in which they were called, or assigned by a subclass.

    For ``Mapping.between``. The model's graph is followed to find which features were flattened from feature maps,
    whose order differs between the frameworks; layers for which that cannot be determined say so, and are not paired.

    Args:
        model: built, so that it has its weights.
        names: of its variables, by ``id`` of the ``tf.Variable``; those that the flat buffers use if not given.
    """
    if names is None:
        trained = model.trainable_variables
        ids = {id(native(variable)) for variable in trained}
        variables = [*trained, *(v for v in model.weights if id(native(v)) not in ids)]
        names = dict(zip([id(native(v)) for v in variables], names_of(variables, model), strict=True))
    orders = FeatureOrders(model, list(_leaves(model)))
    leaves = _leaves(model, orders.calls)
    described = [(leaf, _layer(leaf, own, names, orders)) for leaf in leaves for own in _descriptions(leaf, names)]
    return _with_parallels(described, orders.ancestors)


def _with_parallels(described: Sequence[tuple[Any, Layer]], ancestors: Mapping[int, set[int]]) -> list[Layer]:
    """Layers, with a mark on those that have a like that comes neither before nor after them."""
    by_signature: dict[Any, list[Any]] = {}
    for leaf, layer in described:
        by_signature.setdefault(layer.signature, []).append(leaf)

    def is_parallel(one: Any, other: Any) -> bool:
        known = ancestors.get(id(one)), ancestors.get(id(other))
        if one is other or known[0] is None or known[1] is None:
            return False
        return id(other) not in known[0] and id(one) not in known[1]

    return [
        replace(layer, is_parallel=any(is_parallel(leaf, other) for other in by_signature[layer.signature]))
        for leaf, layer in described
    ]


def _leaves(layer: Any, calls: Mapping[int, int] | None = None) -> Iterator[Any]:
    """The layers that compute, those of models and of other layers included.

    Functional models list their layers by depth, which for branches is another order than that of the program. With
    ``calls``, see ``FeatureOrders``, theirs come as they were called.
    """
    if wrapped(layer):
        for own in wrapped(layer):
            yield from _leaves(own, calls)
    else:
        inner = sublayers(layer)
        within = {id(native(variable)) for own in inner for variable in own.weights}
        if not inner or any(id(native(variable)) not in within for variable in layer.weights):
            yield layer
        if calls and is_functional(layer):
            inner = sorted(inner, key=lambda own: calls.get(id(own), sys.maxsize))
        for own in inner:
            yield from _leaves(own, calls)


def _layer(leaf: Any, own: _Description, names: Mapping[int, str], orders: FeatureOrders) -> Layer:
    tensors = {}
    for role, (variable, axes, *part) in own.roles.items():
        shape = tuple(variable.shape)
        ranges = (tuple(part), *((0, length) for length in shape[1:])) if part else None
        tensors[role] = Tensor(names[id(native(variable))], axes, shape, ranges)
    described = Layer(
        leaf.name + own.suffix,
        own.kind,
        tensors,
        orders=own.orders,
        lengths=own.lengths,
        structure=own.structure,
        settings=own.settings,
    )
    if own.suffix:  # the second part of a layer
        return described
    letters = {letter for tensor in tensors.values() for group in tensor.groups for letter in group}
    found = {"i": orders.inputs.get(id(leaf)), "o": orders.outputs.get(id(leaf))}
    return _with_orders(described, {letter: found[letter] for letter in found if letter in letters}, orders.has_maps)


def _with_orders(layer: Layer, found: Mapping[str, Order | None], has_maps: bool) -> Layer:
    known = dict(layer.orders)
    for letter, order in found.items():
        segments = None if order is None else order.segments()
        # Channels and features that were made at will have an order only where something was found out about it.
        is_doubtful = order is not None or (letter == "i" and not layer.kind.endswith("convolution"))
        if segments is None and is_doubtful and has_maps:
            sides = {"i": "input", "o": "output"}
            return replace(
                layer,
                unknown=f"the order of the {sides[letter]} features of {layer.kind} {layer.name!r} is not known: the "
                "model has feature maps, whose elements are flattened in another order in PyTorch, and it cannot be "
                "determined whether they are among these features (that needs a Sequential, functional or subclassed "
                "model of Keras layers and keras.ops)",
            )
        if segments is not None and any(len(factors) > 1 for factors in segments):
            known[letter] = tuple((str(number), factors) for number, factors in enumerate(segments))
    return replace(layer, orders=known)


def _descriptions(layer: Any, names: Mapping[int, str]) -> list[_Description]:
    """What a layer is, as one or several layers of the kinds that can be paired, or of its own kind."""
    own = _own_weights(layer)
    if not own:
        return []
    describe = _KINDS.get(type(layer))
    found = [] if describe is None else describe(layer)
    used = {id(native(variable)) for part in found for variable, *_ in part.roles.values()}
    if used != {id(native(variable)) for variable in own} or not used <= names.keys():
        known = [variable for variable in own if id(native(variable)) in names]
        return [_Description(type(layer).__name__, {str(n): (v, "") for n, v in enumerate(known)})]
    return found


def _own_weights(layer: Any) -> list[Any]:
    """The weights of a layer that are floating-point numbers and no other described layer's."""
    inner = {id(native(variable)) for own in sublayers(layer) for variable in own.weights}
    weights = [variable for variable in layer.weights if id(native(variable)) not in inner]
    return [variable for variable in weights if keras.backend.is_float_dtype(variable.dtype)]


def _present(**roles: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """The roles of which the variables exist. Spaces in roles are written as underscores."""
    return {role.replace("_", " "): given for role, given in roles.items() if given[0] is not None}


def _dense(layer: Any) -> list[_Description]:
    return [_Description("dense", _present(weight=(layer.kernel, "io"), bias=(layer.bias, "o")))]


def _convolution(layer: Any) -> list[_Description]:
    places = "dhw"[-layer.rank :]
    channels = layer.kernel.shape[-2] * layer.groups
    if layer.groups == channels > 1:
        return [_depthwise(layer, places + "i(pm)", channels, layer.kernel, layer.bias)]
    roles = _present(weight=(layer.kernel, places + "io"), bias=(layer.bias, "o"))
    return [_Description("convolution", roles, {"groups": layer.groups})]


def _depthwise_convolution(layer: Any) -> list[_Description]:
    places = "dhw"[-layer.rank :]
    channels = layer.kernel.shape[-2]
    if channels == 1:
        roles = _present(weight=(layer.kernel, places + "io"), bias=(layer.bias, "o"))
        return [_Description("convolution", roles, {"groups": 1})]
    return [_depthwise(layer, places + "p(im)", channels, layer.kernel, layer.bias)]


def _depthwise(layer: Any, axes: str, channels: int, kernel: Any, bias: Any) -> _Description:
    multiplier = int(layer.filters // channels) if hasattr(layer, "filters") and bias is not None else None
    if multiplier is None:
        size = 1
        for length in kernel.shape:
            size *= int(length)
        for length in layer.kernel_size:
            size //= int(length)
        multiplier = size // channels
    lengths = {"p": int(channels), "m": multiplier, "i": 1}
    return _Description("depthwise convolution", _present(weight=(kernel, axes), bias=(bias, "(pm)")), lengths=lengths)


def _separable_convolution(layer: Any) -> list[_Description]:
    places = "dhw"[-layer.rank :]
    channels = layer.depthwise_kernel.shape[-2]
    roles = _present(weight=(layer.pointwise_kernel, places + "io"), bias=(layer.bias, "o"))
    first = (
        _depthwise(layer, places + "p(im)", channels, layer.depthwise_kernel, None)
        if channels > 1
        else _Description("convolution", {"weight": (layer.depthwise_kernel, places + "io")}, {"groups": 1})
    )
    return [first, _Description("convolution", roles, {"groups": 1}, suffix=" (pointwise)")]


def _transposed_convolution(layer: Any) -> list[_Description]:
    roles = _present(weight=(layer.kernel, "dhw"[-layer.rank :] + "oi"), bias=(layer.bias, "o"))
    return [_Description("transposed convolution", roles, {"groups": 1})]


def _batch_norm(layer: Any) -> list[_Description]:
    roles = _present(
        weight=(layer.gamma, "i"), bias=(layer.beta, "i"), mean=(layer.moving_mean, "i"),
        variance=(layer.moving_variance, "i"),
    )  # fmt: skip
    return [_Description("batch norm", roles, settings={"epsilon": layer.epsilon, "momentum": 1 - layer.momentum})]


def _layer_norm(layer: Any) -> list[_Description]:
    roles = _present(weight=(layer.gamma, "i"), bias=(layer.beta, "i"))
    if any(len(variable.shape) != 1 for variable, _ in roles.values()):
        return []
    return [_Description("layer norm", roles, settings={"epsilon": layer.epsilon})]


def _rms_norm(layer: Any) -> list[_Description]:
    if len(layer.scale.shape) != 1:
        return []
    return [_Description("rms norm", {"weight": (layer.scale, "i")}, settings={"epsilon": layer.epsilon})]


def _group_norm(layer: Any) -> list[_Description]:
    roles = _present(weight=(layer.gamma, "i"), bias=(layer.beta, "i"))
    return [_Description("group norm", roles, {"groups": layer.groups}, {"epsilon": layer.epsilon})]


def _prelu(layer: Any) -> list[_Description]:
    shape = tuple(layer.alpha.shape)
    if any(length != 1 for length in shape[:-1]):
        return []
    return [_Description("prelu", {"weight": (layer.alpha, "xyz"[: len(shape) - 1] + "i")})]


def _embedding(layer: Any) -> list[_Description]:
    return [_Description("embedding", {"weight": (layer.embeddings, "no")})]


def _attention(layer: Any) -> list[_Description]:
    query, key, value, output = layer.query_dense, layer.key_dense, layer.value_dense, layer.output_dense
    if len(output.kernel.shape) != 3:
        return []
    biases = _present(
        query_bias=(query.bias, "pe"), key_bias=(key.bias, "pe"), value_bias=(value.bias, "pf"),
        output_bias=(output.bias, "o"),
    )  # fmt: skip
    weights = {
        "query weight": (query.kernel, "ipe"),
        "key weight": (key.kernel, "jpe"),
        "value weight": (value.kernel, "kpf"),
        "output weight": (output.kernel, "pfo"),
    }
    lengths = {"p": layer.num_heads, "e": layer.key_dim, "f": layer.value_dim}
    return [_Description("attention", {**weights, **biases}, {"heads": layer.num_heads}, lengths=lengths)]


def _recurrent(kind: str, layer: Any) -> _Description:
    roles = _present(
        weight=(layer.cell.kernel, "iu"), recurrent_weight=(layer.cell.recurrent_kernel, "vu"),
        bias=(layer.cell.bias, "u"),
    )  # fmt: skip
    direction = "backward" if layer.go_backwards else "forward"
    structure = {"activation": _name(layer.activation), "direction": direction}
    if kind != "simple rnn":
        structure["recurrent activation"] = _name(layer.recurrent_activation)
    return _Description(kind, roles, structure)


def _gru(layer: Any) -> list[_Description]:
    described = _recurrent("gru", layer)
    structure = {**described.structure, "reset_after": bool(layer.reset_after)}
    orders = {"u": tuple((gate, (("n", int(layer.units)),)) for gate in "zrh")}
    roles = dict(described.roles)
    if "bias" in roles and layer.reset_after:
        roles |= {"bias": (layer.cell.bias, "xu", 0, 1), "recurrent bias": (layer.cell.bias, "xu", 1, 2)}
    return [replace(described, structure=structure, roles=roles, orders=orders)]


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


_KINDS: dict[Any, Callable[[Any], list[_Description]]] = {
    L.Dense: _dense,
    **dict.fromkeys((L.Conv1D, L.Conv2D, L.Conv3D), _convolution),
    **dict.fromkeys((L.DepthwiseConv1D, L.DepthwiseConv2D), _depthwise_convolution),
    **dict.fromkeys((L.SeparableConv1D, L.SeparableConv2D), _separable_convolution),
    **dict.fromkeys((L.Conv1DTranspose, L.Conv2DTranspose, L.Conv3DTranspose), _transposed_convolution),
    L.BatchNormalization: _batch_norm,
    L.LayerNormalization: _layer_norm,
    L.RMSNormalization: _rms_norm,
    L.GroupNormalization: _group_norm,
    L.PReLU: _prelu,
    L.Embedding: _embedding,
    L.MultiHeadAttention: _attention,
    L.LSTM: lambda layer: [_recurrent("lstm", layer)],
    L.GRU: _gru,
    L.SimpleRNN: lambda layer: [_recurrent("simple rnn", layer)],
}
"""By class: describes a layer."""
