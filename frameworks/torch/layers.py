"""What a PyTorch model consists of, for pairing its layers with another framework's."""

from typing import Any

import torch
from torch import nn

from lentando.optimizers.checkpoint.layers import Layer, Tensor

__all__ = ["layers"]

KINDS: tuple[tuple[Any, str, dict[str, tuple[str, str]]], ...] = (
    (nn.Linear, "dense", {"weight": ("weight", "oi"), "bias": ("bias", "o")}),
    (nn.Conv1d, "convolution", {"weight": ("weight", "oiw"), "bias": ("bias", "o")}),
    (nn.Conv2d, "convolution", {"weight": ("weight", "oihw"), "bias": ("bias", "o")}),
    (nn.Conv3d, "convolution", {"weight": ("weight", "oidhw"), "bias": ("bias", "o")}),
    (
        (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
        "batch norm",
        {
            "weight": ("weight", "i"),
            "bias": ("bias", "i"),
            "running_mean": ("mean", "i"),
            "running_var": ("variance", "i"),
        },
    ),
    (nn.Embedding, "embedding", {"weight": ("weight", "no")}),
)
"""By class or classes: what it is, and for each of its tensors the role and what its axes count."""


def layers(model: nn.Module) -> list[Layer]:
    """The layers of a model that have tensors, in the order in which its modules were made.

    For ``Mapping.between``. Where that is not the order in which they are used, write the mapping by hand.
    """
    names: dict[torch.Tensor, str] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        names.setdefault(tensor, name)  # a tied parameter goes by its first name, as in the flat buffers
    found = []
    for path, module in model.named_modules():
        own = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
        if not any(tensor.is_floating_point() for tensor in own.values()):
            continue
        kind, roles = _kind(module)
        tensors = {}
        for attribute, tensor in own.items():
            if attribute in roles:
                role, axes = roles[attribute]
                tensors[role] = Tensor(names[tensor], axes, tuple(tensor.shape))
        found.append(Layer(path or type(module).__name__, kind, tensors, channels_first=True))
    return found


def _kind(module: nn.Module) -> tuple[str, dict[str, tuple[str, str]]]:
    for known, kind, roles in KINDS:
        grouped = getattr(module, "groups", 1) != 1  # frameworks disagree about more than the order of axes there
        if isinstance(module, known) and not grouped:
            return kind, roles
    return type(module).__name__, {}
