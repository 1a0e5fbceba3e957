"""What ``torch.amp.GradScaler`` leaves to an optimizer that supports scaled gradients itself."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch

__all__ = ["have_finite_gradients", "unscale"]


def unscale(groups: Sequence[dict[str, Any]], found_inf: torch.Tensor, scale: torch.Tensor | None) -> bool:
    """Divide the gradients by the scale of the loss.

    Args:
        groups: parameter groups of the optimizer.
        found_inf: scalar that the ``GradScaler`` has set: not 0 if gradients are not finite.
        scale: the scale, or None if the gradients have been divided by it already.

    Returns:
        Whether the gradients of this rank have overflowed.
    """
    if scale is not None:
        for gradient in _gradients(groups):
            gradient.div_(scale)
    return bool(found_inf.item())


def have_finite_gradients(groups: Sequence[dict[str, Any]]) -> bool:
    """Return whether all gradients of these parameter groups are finite."""
    return all(bool(gradient.isfinite().all()) for gradient in _gradients(groups))


def _gradients(groups: Sequence[dict[str, Any]]) -> Iterator[torch.Tensor]:
    for group in groups:
        for parameter in group["params"]:
            if parameter.grad is not None:
                yield parameter.grad
