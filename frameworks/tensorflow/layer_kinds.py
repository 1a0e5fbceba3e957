"""Descriptions of single Keras layers as layers of the kinds that exist in both frameworks."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import keras

from lentando.optimizers.checkpoint.layers import Segment
from lentando.tensorflow.functional_graphs import sublayers
from lentando.tensorflow.state_variables import native

__all__ = ["LayerDescription", "descriptions_of"]

L = keras.layers


@dataclass(frozen=True)
class LayerDescription:
    """A layer, or one of the parts that correspond to a layer in another framework, with variables in place of names.

    Attributes:
        kind: kind of the layer, as in ``lentando.optimizers.checkpoint.layers.Layer``.
        roles: for each role the variable and one letter per axis; if only a part of the first axis has that role, also
            its first index and the index after its last.
        structure, settings, lengths, orders: fields of ``Layer`` of the same names.
        suffix: appended to the Keras layer's name; empty for a first or only part.
    """

    kind: str
    roles: Mapping[str, tuple[Any, ...]]
    structure: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    lengths: Mapping[str, int] = field(default_factory=dict)
    orders: Mapping[str, tuple[Segment, ...]] = field(default_factory=dict)
    suffix: str = ""


def descriptions_of(layer: Any, names: Mapping[int, str]) -> list[LayerDescription]:
    """A layer as one or several layers of the kinds that can be paired, else as one of a kind of its own.

    Args:
        layer: a Keras layer.
        names: names of variables, by ``id`` of the ``tf.Variable``.

    Returns:
        The parts of the layer; none for a layer without floating-point weights.
    """
    weights = _direct_weights(layer)
    if not weights:
        return []
    describe = _KINDS.get(type(layer))
    parts = [] if describe is None else describe(layer)
    used = {id(native(variable)) for part in parts for variable, *_ in part.roles.values()}
    if used != {id(native(variable)) for variable in weights} or not used <= names.keys():
        known = [variable for variable in weights if id(native(variable)) in names]
        return [LayerDescription(type(layer).__name__, {str(n): (v, "") for n, v in enumerate(known)})]
    return parts


def _direct_weights(layer: Any) -> list[Any]:
    """The floating-point weights of a layer that do not belong to a layer inside it."""
    inner = {id(native(variable)) for sublayer in sublayers(layer) for variable in sublayer.weights}
    weights = [variable for variable in layer.weights if id(native(variable)) not in inner]
    return [variable for variable in weights if keras.backend.is_float_dtype(variable.dtype)]


def _present(**roles: tuple[Any, ...]) -> dict[str, tuple[Any, ...]]:
    """The roles whose variables exist. Underscores in the names of arguments stand for spaces."""
    return {role.replace("_", " "): entry for role, entry in roles.items() if entry[0] is not None}


def _dense(layer: Any) -> list[LayerDescription]:
    return [LayerDescription("dense", _present(weight=(layer.kernel, "io"), bias=(layer.bias, "o")))]


def _convolution(layer: Any) -> list[LayerDescription]:
    places = "dhw"[-layer.rank :]
    channels = layer.kernel.shape[-2] * layer.groups
    if layer.groups == channels > 1:
        return [_depthwise(layer, places + "i(pm)", channels, layer.kernel, layer.bias)]
    roles = _present(weight=(layer.kernel, places + "io"), bias=(layer.bias, "o"))
    return [LayerDescription("convolution", roles, {"groups": layer.groups})]


def _depthwise_convolution(layer: Any) -> list[LayerDescription]:
    places = "dhw"[-layer.rank :]
    channels = layer.kernel.shape[-2]
    if channels == 1:
        roles = _present(weight=(layer.kernel, places + "io"), bias=(layer.bias, "o"))
        return [LayerDescription("convolution", roles, {"groups": 1})]
    return [_depthwise(layer, places + "p(im)", channels, layer.kernel, layer.bias)]


def _depthwise(layer: Any, axes: str, channels: int, kernel: Any, bias: Any) -> LayerDescription:
    multiplier = int(layer.filters // channels) if hasattr(layer, "filters") and bias is not None else None
    if multiplier is None:
        size = 1
        for length in kernel.shape:
            size *= int(length)
        for length in layer.kernel_size:
            size //= int(length)
        multiplier = size // channels
    lengths = {"p": int(channels), "m": multiplier, "i": 1}
    return LayerDescription(
        "depthwise convolution", _present(weight=(kernel, axes), bias=(bias, "(pm)")), lengths=lengths
    )


def _separable_convolution(layer: Any) -> list[LayerDescription]:
    places = "dhw"[-layer.rank :]
    channels = layer.depthwise_kernel.shape[-2]
    roles = _present(weight=(layer.pointwise_kernel, places + "io"), bias=(layer.bias, "o"))
    first = (
        _depthwise(layer, places + "p(im)", channels, layer.depthwise_kernel, None)
        if channels > 1
        else LayerDescription("convolution", {"weight": (layer.depthwise_kernel, places + "io")}, {"groups": 1})
    )
    return [first, LayerDescription("convolution", roles, {"groups": 1}, suffix=" (pointwise)")]


def _transposed_convolution(layer: Any) -> list[LayerDescription]:
    roles = _present(weight=(layer.kernel, "dhw"[-layer.rank :] + "oi"), bias=(layer.bias, "o"))
    return [LayerDescription("transposed convolution", roles, {"groups": 1})]


def _batch_norm(layer: Any) -> list[LayerDescription]:
    roles = _present(
        weight=(layer.gamma, "i"), bias=(layer.beta, "i"), mean=(layer.moving_mean, "i"),
        variance=(layer.moving_variance, "i"),
    )  # fmt: skip
    return [LayerDescription("batch norm", roles, settings={"epsilon": layer.epsilon, "momentum": 1 - layer.momentum})]


def _layer_norm(layer: Any) -> list[LayerDescription]:
    roles = _present(weight=(layer.gamma, "i"), bias=(layer.beta, "i"))
    if any(len(variable.shape) != 1 for variable, _ in roles.values()):
        return []
    return [LayerDescription("layer norm", roles, settings={"epsilon": layer.epsilon})]


def _rms_norm(layer: Any) -> list[LayerDescription]:
    if len(layer.scale.shape) != 1:
        return []
    return [LayerDescription("rms norm", {"weight": (layer.scale, "i")}, settings={"epsilon": layer.epsilon})]


def _group_norm(layer: Any) -> list[LayerDescription]:
    roles = _present(weight=(layer.gamma, "i"), bias=(layer.beta, "i"))
    return [LayerDescription("group norm", roles, {"groups": layer.groups}, {"epsilon": layer.epsilon})]


def _prelu(layer: Any) -> list[LayerDescription]:
    shape = tuple(layer.alpha.shape)
    if any(length != 1 for length in shape[:-1]):
        return []
    return [LayerDescription("prelu", {"weight": (layer.alpha, "xyz"[: len(shape) - 1] + "i")})]


def _embedding(layer: Any) -> list[LayerDescription]:
    return [LayerDescription("embedding", {"weight": (layer.embeddings, "no")})]


def _attention(layer: Any) -> list[LayerDescription]:
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
    return [LayerDescription("attention", {**weights, **biases}, {"heads": layer.num_heads}, lengths=lengths)]


def _recurrent(kind: str, layer: Any) -> LayerDescription:
    roles = _present(
        weight=(layer.cell.kernel, "iu"), recurrent_weight=(layer.cell.recurrent_kernel, "vu"),
        bias=(layer.cell.bias, "u"),
    )  # fmt: skip
    direction = "backward" if layer.go_backwards else "forward"
    structure = {"activation": _name(layer.activation), "direction": direction}
    if kind != "simple rnn":
        structure["recurrent activation"] = _name(layer.recurrent_activation)
    return LayerDescription(kind, roles, structure)


def _gru(layer: Any) -> list[LayerDescription]:
    described = _recurrent("gru", layer)
    structure = {**described.structure, "reset_after": bool(layer.reset_after)}
    orders = {"u": tuple((gate, (("n", int(layer.units)),)) for gate in "zrh")}
    roles = dict(described.roles)
    if "bias" in roles and layer.reset_after:
        roles |= {"bias": (layer.cell.bias, "xu", 0, 1), "recurrent bias": (layer.cell.bias, "xu", 1, 2)}
    return [replace(described, structure=structure, roles=roles, orders=orders)]


def _name(function: Any) -> str:
    return str(getattr(function, "__name__", function))


_KINDS: dict[Any, Callable[[Any], list[LayerDescription]]] = {
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
"""For each class of layers that can be paired, the function that describes one."""
