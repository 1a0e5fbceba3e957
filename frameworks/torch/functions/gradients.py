"""Gradients of collectives: a backward pass through a collective is a collective, too, as in Horovod."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from lentando.torch.compression import Compressor

__all__ = ["compressed_with_gradient", "needs_gradient", "with_gradient"]

Function = Callable[[Sequence[torch.Tensor]], Sequence[torch.Tensor]]


def with_gradient(forward: Function, backward: Function, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """Call ``forward(tensors)`` so that gradients pass through it by ``backward``.

    Every rank must run the backward pass, because it communicates.

    Args:
        forward: function of the tensors, whose results share no memory with them.
        backward: returns the gradients of the tensors, given those of the results.
        tensors: the arguments.
    """
    if needs_gradient(tensors):
        return list(_Collective.apply(forward, backward, *tensors))  # type: ignore[no-untyped-call]
    return list(forward(tensors))


def compressed_with_gradient(
    forward: Function, backward: Function, tensors: Sequence[torch.Tensor], compression: type[Compressor]
) -> list[torch.Tensor]:
    """Do the same with compressed tensors, and decompress the results.

    Args:
        forward: as for ``with_gradient``, of compressed tensors.
        backward: as for ``with_gradient``.
        tensors: the arguments.
        compression: how they are compressed while they are sent.
    """
    compressed = [compression.compress(tensor) for tensor in tensors]
    results = with_gradient(forward, backward, [tensor for tensor, _ in compressed])
    return [compression.decompress(result, ctx) for result, (_, ctx) in zip(results, compressed, strict=True)]


def needs_gradient(tensors: Sequence[torch.Tensor]) -> bool:
    """Return whether gradients must pass through a function of these tensors."""
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


class _Collective(torch.autograd.Function):
    """A collective in the graph of a backward pass."""

    @staticmethod
    def forward(ctx: Any, forward: Function, backward: Function, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        ctx.backward_function = backward
        return tuple(forward(tensors))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return None, None, *ctx.backward_function(gradients)
