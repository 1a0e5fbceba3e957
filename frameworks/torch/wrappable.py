"""Checks of which tensors of a model can be averaged, with messages that name those that cannot."""

from collections.abc import Iterable, Mapping
from itertools import pairwise

import torch
from torch.nn.parameter import is_lazy

from lentando.comm.errors import ConfigurationError
from lentando.torch.local_tensors import address, is_dense, overlaps_itself, place

__all__ = ["AVERAGED", "check_parameters", "check_sendable", "check_separate", "is_averaged"]

AVERAGED = frozenset(
    {
        torch.float16,
        torch.bfloat16,
        torch.float32,
        torch.float64,
        torch.complex32,
        torch.complex64,
        torch.complex128,
    }
)
"""Dtypes that can be averaged, complex numbers as pairs of real numbers."""


def is_averaged(buffer: torch.Tensor) -> bool:
    """Return whether a buffer of a model is averaged at outer steps. Integer, float8 and sparse buffers are not."""
    if buffer.dtype not in AVERAGED or buffer.layout is not torch.strided or buffer.is_conj():
        return False
    return bool(address(buffer)) or not buffer.numel()


def check_parameters(parameters: Mapping[str, torch.Tensor]) -> None:
    """Check that the trainable parameters can be averaged.

    Raises:
        ConfigurationError: for the first parameter that cannot, with its name, the reason, and what to do.
    """
    for name, parameter in parameters.items():
        reason = _obstacle(parameter)
        if reason is None and parameter.dtype not in AVERAGED:
            reason = (
                f"it is of {parameter.dtype}, which has no average here. Keep trained parameters in float16, bfloat16, "
                "float32 or float64 and convert them where they are used, or freeze it"
            )
        if reason is None and overlaps_itself(parameter):
            reason = (
                "several of its elements share one place in memory (it was expanded). Make it a parameter with memory "
                "of its own, by .clone() or .contiguous(), or expand it where it is used"
            )
        if reason is not None:
            raise ConfigurationError(f"parameter {name!r} cannot be averaged: {reason}")


def check_sendable(name: str, tensor: torch.Tensor) -> None:
    """Check that a tensor that is not averaged can be sent from rank 0 and saved.

    Raises:
        ConfigurationError: if it cannot, with its name, the reason, and what to do.
    """
    reason = None if tensor.layout is not torch.strided else _obstacle(tensor)
    if reason is not None:
        raise ConfigurationError(f"the model's {name!r} can be neither taken over from rank 0 nor saved: {reason}")


def check_separate(trained: Mapping[str, torch.Tensor], others: Iterable[tuple[str, torch.Tensor]]) -> None:
    """Check that no other tensor of the model uses the memory of a trainable parameter.

    The parameters are moved into flat memory, so that they would no longer share it afterwards.

    Args:
        trained: trainable parameters by name.
        others: pairs of name and tensor of the model. Those that are trained, under another name, are ignored.

    Raises:
        ConfigurationError: for the first two that share memory without being one parameter.
    """
    known = {id(parameter) for parameter in trained.values()}
    named = [*trained.items(), *(pair for pair in others if id(pair[1]) not in known)]
    dense = [(name, t) for name, t in named if address(t) and t.numel() and is_dense(t)]
    dense.sort(key=lambda pair: address(pair[1]))
    for (name, tensor), (other_name, other) in pairwise(dense):
        if tensor is not other and tensor.device == other.device and address(other) < place(tensor)[1]:
            if name not in trained and other_name not in trained:
                continue
            raise ConfigurationError(
                f"{name!r} and {other_name!r} share memory without being one parameter, so that they would come apart: "
                "tie them by assigning the parameter itself (model.b = model.a), or give one of them memory of its own "
                "(.clone())"
            )


def _obstacle(tensor: torch.Tensor) -> str | None:
    """The reason why a tensor has no values that can be sent, with what to do, or None if it has."""
    if is_lazy(tensor):
        return "its module is lazy and has not seen an input. Pass a batch through the model before wrapping"
    if tensor.is_meta:
        return (
            "it is on the meta device, without memory. Make the model real first (model.to_empty(device=...), and "
            "initialize or load it)"
        )
    if tensor.layout is not torch.strided:
        return f"it is sparse ({tensor.layout}). Use a dense parameter, or freeze it"
    if tensor.is_quantized:
        return "it is quantized. Wrap before converting to integers: fake quantization can be trained"
    if tensor.numel() and not address(tensor):
        kind = type(tensor.data if type(tensor) is torch.nn.Parameter else tensor).__name__
        advice = "Every rank must hold a whole replica"
        if kind == "DTensor":
            advice += ": leave out fully_shard (FSDP2) and tensor parallelism, or use them without this optimizer"
        return f"it is a {kind}, which has no memory of its own. {advice}"
    return None
