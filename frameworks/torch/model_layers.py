"""What a PyTorch model consists of, for pairing its layers with another framework's."""

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn

from lentando.optimizers.checkpoint.layers import Layer, Tensor

__all__ = ["layers"]

Names = Mapping[torch.Tensor, str]


def layers(model: nn.Module) -> list[Layer]:
    """The layers of a model that have tensors, in the order in which its modules were made.

    For ``Mapping.between``. Feature maps are taken to be flattened as PyTorch has them, channels first.
    """
    names: dict[torch.Tensor, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        names.setdefault(tensor, name)  # a tied parameter goes by its first name, as in the flat buffers
    found: list[Layer] = []
    whole: list[str] = []  # modules that are described with all that they contain
    for path, module in model.named_modules():
        if any(path.startswith(outer) for outer in whole):
            continue
        own = _own(module)
        if not own:
            continue
        name = path or type(module).__name__
        described = next((describe for known, describe in KINDS if isinstance(module, known)), None)
        parts = [] if described is None else list(described(module, _Describing(name, names)))
        used = {tensor.name for layer in parts for tensor in layer.tensors.values()}
        if isinstance(module, nn.MultiheadAttention):
            own = _own(module) | {f"out_proj.{key}": value for key, value in _own(module.out_proj).items()}
            whole.append(f"{path}." if path else "")
        if used != {names[tensor] for tensor in own.values()}:
            tensors = {key: Tensor(names[tensor], "", tuple(tensor.shape)) for key, tensor in own.items()}
            parts = [Layer(name, type(module).__name__, tensors, channels_first=True)]
        found += parts
    return found


def _own(module: nn.Module) -> dict[str, torch.Tensor]:
    """The floating-point tensors of a module without those of its children."""
    tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
    return {key: tensor for key, tensor in tensors.items() if tensor.is_floating_point()}


class _Describing:
    """Makes descriptions of a module's tensors."""

    def __init__(self, name: str, names: Names) -> None:
        self._name = name
        self._names = names

    def layer(self, kind: str, tensors: Mapping[str, tuple[Any, ...]], *, suffix: str = "", **about: Any) -> Layer:
        """A layer.

        Args:
            kind: see ``Layer``.
            tensors: for each role the tensor, perhaps None, and what its axes count; with first index and index after
                the last of its first axis, where that is only a part.
            suffix: of the name, for one of several layers.
            about: more of ``Layer``.
        """
        found = {}
        for role, (tensor, axes, *part) in tensors.items():
            if tensor is not None and tensor in self._names:  # it may be computed of others
                shape = tuple(tensor.shape)
                ranges = (tuple(part), *((0, length) for length in shape[1:])) if part else None
                found[role] = Tensor(self._names[tensor], axes, shape, ranges)
        return Layer(self._name + suffix, kind, found, channels_first=True, **about)


def _dense(module: Any, own: _Describing) -> Iterator[Layer]:
    yield own.layer("dense", {"weight": (module.weight, "oi"), "bias": (module.bias, "o")})


def _convolution(module: Any, own: _Describing) -> Iterator[Layer]:
    places = "dhw"[-(module.weight.dim() - 2) :]
    channels = module.in_channels
    if module.groups == channels > 1:
        lengths = {"p": channels, "m": module.out_channels // channels, "i": 1}
        tensors = {"weight": (module.weight, "(pm)i" + places), "bias": (module.bias, "(pm)")}
        yield own.layer("depthwise convolution", tensors, lengths=lengths)
        return
    tensors = {"weight": (module.weight, "oi" + places), "bias": (module.bias, "o")}
    yield own.layer("convolution", tensors, structure={"groups": module.groups})


def _transposed_convolution(module: Any, own: _Describing) -> Iterator[Layer]:
    places = "dhw"[-(module.weight.dim() - 2) :]
    tensors = {"weight": (module.weight, "io" + places), "bias": (module.bias, "o")}
    yield own.layer("transposed convolution", tensors, structure={"groups": module.groups})


def _batch_norm(module: Any, own: _Describing) -> Iterator[Layer]:
    tensors = {
        "weight": (module.weight, "i"),
        "bias": (module.bias, "i"),
        "mean": (module.running_mean, "i"),
        "variance": (module.running_var, "i"),
    }
    momentum = "cumulative average" if module.momentum is None else module.momentum
    yield own.layer("batch norm", tensors, settings={"epsilon": module.eps, "momentum": momentum})


def _layer_norm(module: Any, own: _Describing) -> Iterator[Layer]:
    if module.weight.dim() == 1:
        tensors = {"weight": (module.weight, "i"), "bias": (module.bias, "i")}
        yield own.layer("layer norm", tensors, settings={"epsilon": module.eps})


def _rms_norm(module: Any, own: _Describing) -> Iterator[Layer]:
    if module.weight.dim() == 1:
        epsilon = torch.finfo(module.weight.dtype).eps if module.eps is None else module.eps
        yield own.layer("rms norm", {"weight": (module.weight, "i")}, settings={"epsilon": epsilon})


def _group_norm(module: Any, own: _Describing) -> Iterator[Layer]:
    groups = module.num_groups if isinstance(module, nn.GroupNorm) else module.num_features
    tensors = {"weight": (module.weight, "i"), "bias": (module.bias, "i")}
    yield own.layer("group norm", tensors, structure={"groups": groups}, settings={"epsilon": module.eps})


def _prelu(module: Any, own: _Describing) -> Iterator[Layer]:
    yield own.layer("prelu", {"weight": (module.weight, "i")})


def _embedding(module: Any, own: _Describing) -> Iterator[Layer]:
    yield own.layer("embedding", {"weight": (module.weight, "no")})


def _attention(module: Any, own: _Describing) -> Iterator[Layer]:
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
    yield own.layer("attention", tensors, structure={"heads": module.num_heads}, lengths=lengths)


def _recurrent(module: Any, own: _Describing) -> Iterator[Layer]:
    """One layer for each layer and direction, as Keras has it."""
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
            of = f"_l{number}{direction}"
            tensors = {
                "weight": (getattr(module, f"weight_ih{of}"), "ui"),
                "recurrent weight": (getattr(module, f"weight_hh{of}"), "uv"),
                "bias": (getattr(module, f"bias_ih{of}", None), "u"),
                "recurrent bias": (getattr(module, f"bias_hh{of}", None), "u"),
            }
            suffix = "" if single else f" ({of.removeprefix('_')})"
            directed = {**structure, "direction": "backward" if direction else "forward"}
            yield own.layer(kind, tensors, structure=directed, orders=orders, suffix=suffix)


KINDS: tuple[tuple[Any, Callable[[Any, _Describing], Iterator[Layer]]], ...] = (
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
"""By class or classes: describes a module, as one or several layers, or as none if it cannot be paired."""
