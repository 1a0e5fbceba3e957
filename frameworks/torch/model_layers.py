"""A description of the layers of a PyTorch model, for pairing them with the layers of another framework."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lentando.optimizers.checkpoint.layers import Layer, Tensor

__all__ = ["layers"]

Names = Mapping[torch.Tensor, str]


def layers(model: nn.Module) -> list[Layer]:
    """Return the layers of a model that have tensors, in the order in which its modules were made.

    ``WeightMap.between`` pairs them with those of another model. Feature maps are assumed to be flattened with the
    channels first, as in PyTorch.
    """
    names: dict[torch.Tensor, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        names.setdefault(tensor, name)  # a tied parameter has its first name, as in the flat buffers
    described: list[Layer] = []
    whole: list[str] = []  # prefixes of the modules that are described together with the modules in them
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in whole):
            continue
        tensors_of_module = _own_tensors(module)
        if not tensors_of_module:
            continue
        name = path or type(module).__name__
        describe = next((describe for classes, describe in KINDS if isinstance(module, classes)), None)
        parts = [] if describe is None else list(describe(module, _LayerBuilder(name, names)))
        used = {tensor.name for layer in parts for tensor in layer.tensors.values()}
        if isinstance(module, nn.MultiheadAttention):
            of_projection = _own_tensors(module.out_proj)
            tensors_of_module |= {f"out_proj.{key}": tensor for key, tensor in of_projection.items()}
            whole.append(f"{path}." if path else "")
        if used != {names[tensor] for tensor in tensors_of_module.values()}:
            tensors = {key: Tensor(names[tensor], "", tuple(tensor.shape)) for key, tensor in tensors_of_module.items()}
            parts = [Layer(name, type(module).__name__, tensors, channels_first=True)]
        described += parts
    return described


def _own_tensors(module: nn.Module) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a module, without those of its children."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}


class _LayerBuilder:
    """Builds the ``Layer`` objects of one module.

    Args:
        name: path of the module.
        names: name of each tensor of the model.
    """

    def __init__(self, name: str, names: Names) -> None:
        self._name = name
        self._names = names

    def layer(self, kind: str, tensors: Mapping[str, tuple[Any, ...]], *, suffix: str = "", **options: Any) -> Layer:
        """Build one layer.

        Args:
            kind: kind of the layer, the same in all frameworks.
            tensors: for each role, the tensor (or None) and the meaning of its axes. If only a part of its first axis
                belongs to this role, also the first index of that part and the index after its last.
            suffix: text that is appended to the name of the module, where it has several layers.
            options: further arguments of ``Layer``.
        """
        described = {}
        for role, (tensor, axes, *part) in tensors.items():
            if tensor is not None and tensor in self._names:  # a parametrized tensor is computed from others
                shape = tuple(tensor.shape)
                ranges = (tuple(part), *((0, length) for length in shape[1:])) if part else None
                described[role] = Tensor(self._names[tensor], axes, shape, ranges)
        return Layer(self._name + suffix, kind, described, channels_first=True, **options)


def _dense(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    yield builder.layer("dense", {"weight": (module.weight, "oi"), "bias": (module.bias, "o")})


def _convolution(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    places = "dhw"[-(module.weight.dim() - 2) :]
    channels = module.in_channels
    if module.groups == channels > 1:
        lengths = {"p": channels, "m": module.out_channels // channels, "i": 1}
        tensors = {"weight": (module.weight, "(pm)i" + places), "bias": (module.bias, "(pm)")}
        yield builder.layer("depthwise convolution", tensors, lengths=lengths)
        return
    tensors = {"weight": (module.weight, "oi" + places), "bias": (module.bias, "o")}
    yield builder.layer("convolution", tensors, structure={"groups": module.groups})


def _transposed_convolution(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    places = "dhw"[-(module.weight.dim() - 2) :]
    tensors = {"weight": (module.weight, "io" + places), "bias": (module.bias, "o")}
    yield builder.layer("transposed convolution", tensors, structure={"groups": module.groups})


def _batch_norm(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    tensors = {
        "weight": (module.weight, "i"),
        "bias": (module.bias, "i"),
        "mean": (module.running_mean, "i"),
        "variance": (module.running_var, "i"),
    }
    momentum = "cumulative average" if module.momentum is None else module.momentum
    yield builder.layer("batch norm", tensors, settings={"epsilon": module.eps, "momentum": momentum})


def _layer_norm(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    if module.weight.dim() == 1:
        tensors = {"weight": (module.weight, "i"), "bias": (module.bias, "i")}
        yield builder.layer("layer norm", tensors, settings={"epsilon": module.eps})


def _rms_norm(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    if module.weight.dim() == 1:
        epsilon = torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps
        yield builder.layer("rms norm", {"weight": (module.weight, "i")}, settings={"epsilon": epsilon})


def _group_norm(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    groups = module.num_groups if isinstance(module, nn.GroupNorm) else module.num_features
    tensors = {"weight": (module.weight, "i"), "bias": (module.bias, "i")}
    yield builder.layer("group norm", tensors, structure={"groups": groups}, settings={"epsilon": module.eps})


def _prelu(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    yield builder.layer("prelu", {"weight": (module.weight, "i")})


def _embedding(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    yield builder.layer("embedding", {"weight": (module.weight, "no")})


def _attention(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    size = module.embed_dim
    ranges = [(number * size, (number + 1) * size) for number in range(3)]
    packed, bias = module.in_proj_weight, module.in_proj_bias
    apart = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
    weights: list[tuple[Any, ...]] = [(tensor,) for tensor in apart]
    if packed is not None:
        weights = [(packed, *part) for part in ranges]
    axes = ("(pe)i", "(pe)j", "(pf)k")
    tensors: dict[str, tuple[Any, ...]] = {}
    for role, letters, (tensor, *place) in zip(("query", "key", "value"), axes, weights, strict=True):
        tensors[f"{role} weight"] = (tensor, letters, *place)
    tensors["output weight"] = (module.out_proj.weight, "o(pf)")
    for role, letters, part in zip(("query", "key", "value"), axes, ranges, strict=True):
        tensors[f"{role} bias"] = (bias, letters[:-1], *part)
    tensors["output bias"] = (module.out_proj.bias, "o")
    lengths = {"p": module.num_heads, "e": module.head_dim, "f": module.head_dim}
    yield builder.layer("attention", tensors, structure={"heads": module.num_heads}, lengths=lengths)


def _recurrent(module: Any, builder: _LayerBuilder) -> Iterator[Layer]:
    """Yield one layer for each of the module's layers and directions, as in Keras."""
    if module.proj_size:
        return
    kind = {"LSTM": "lstm", "GRU": "gru", "RNN_TANH": "simple rnn", "RNN_RELU": "simple rnn"}[module.mode]
    structure: dict[str, Any] = {"activation": "relu" if module.mode == "RNN_RELU" else "tanh"}
    if kind != "simple rnn":
        structure["recurrent activation"] = "sigmoid"
    orders = {}
    if kind == "gru":
        structure["reset_after"] = True
        orders["u"] = tuple((gate, (("n", module.hidden_size),)) for gate in "rzh")
    single = module.num_layers == 1 and not module.bidirectional
    for number in range(module.num_layers):
        for direction in ("", "_reverse")[: 2 if module.bidirectional else 1]:
            ending = f"_l{number}{direction}"
            tensors = {
                "weight": (getattr(module, f"weight_ih{ending}"), "ui"),
                "recurrent weight": (getattr(module, f"weight_hh{ending}"), "uv"),
                "bias": (getattr(module, f"bias_ih{ending}", None), "u"),
                "recurrent bias": (getattr(module, f"bias_hh{ending}", None), "u"),
            }
            suffix = "" if single else f" ({ending.removeprefix('_')})"
            directed = {**structure, "direction": "backward" if direction else "forward"}
            yield builder.layer(kind, tensors, structure=directed, orders=orders, suffix=suffix)


KINDS: tuple[tuple[Any, Callable[[Any, _LayerBuilder], Iterator[Layer]]], ...] = (
    (nn.Linear, _dense),
    ((nn.Conv1d, nn.Conv2d, nn.Conv3d), _convolution),
    ((nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d), _transposed_convolution),
    ((nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm), _batch_norm),
    (nn.LayerNorm, _layer_norm),
    (nn.RMSNorm, _rms_norm),
    ((nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d), _group_norm),
    (nn.PReLU, _prelu),
    (nn.Embedding, _embedding),
    (nn.MultiheadAttention, _attention),
    (nn.RNNBase, _recurrent),
)
"""Classes of modules, and the function that describes such a module: as one or several layers, or as none if its layers
cannot be paired."""
