"""Normalization of a batch by the statistics of all ranks' batches, and its gradient.

``torch.compiler.disable`` loads PyTorch's compiler, which takes longer than to load PyTorch: this module is imported
when the first batch is normalized.
"""

from typing import TYPE_CHECKING, Any

import torch

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Sum
from lentando.comm.process_sets import ProcessSet
from lentando.torch.functions.gathering import allgather
from lentando.torch.functions.reducing import allreduce_

if TYPE_CHECKING:
    from lentando.torch.sync_batch_norm import SyncBatchNorm

__all__ = ["normalized_by_all"]


@torch.compiler.disable  # type: ignore[untyped-decorator]  # communication cannot be compiled
def normalized_by_all(layer: "SyncBatchNorm", inputs: torch.Tensor, momentum: float) -> torch.Tensor:
    """Normalize by the statistics of all ranks, and update the running statistics."""
    wide = torch.promote_types(inputs.dtype, torch.float32)
    axes = [axis for axis in range(inputs.dim()) if axis != 1]
    with torch.no_grad():
        mean, variance, count = _statistics_of_all(inputs.to(wide), axes, layer.process_set)
        if count < 2:
            raise ConfigurationError(f"expected more than 1 value per channel on all ranks together, got {count}")
        if layer.training and layer.running_mean is not None and layer.running_var is not None:
            unbiased = variance * (count / (count - 1))
            layer.running_mean.lerp_(mean.to(layer.running_mean.dtype), momentum)
            layer.running_var.lerp_(unbiased.to(layer.running_var.dtype), momentum)
    scale = (variance + layer.eps).rsqrt()
    normalized: torch.Tensor = _Normalization.apply(inputs, mean, scale, count, layer)  # type: ignore[no-untyped-call]
    if layer.weight is None or layer.bias is None:
        return normalized.to(inputs.dtype)
    shape = [1, -1, *[1] * (inputs.dim() - 2)]
    return (normalized * layer.weight.view(shape) + layer.bias.view(shape)).to(inputs.dtype)


def _statistics_of_all(
    inputs: torch.Tensor, axes: list[int], process_set: ProcessSet
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Mean and variance of each channel over all ranks' batches, and the number of values per channel. Collective."""
    channels = inputs.shape[1]
    count = inputs.numel() // channels
    own_mean = inputs.sum(axes) / max(count, 1)
    shape = [1, -1, *[1] * (inputs.dim() - 2)]
    own_squares = (inputs - own_mean.view(shape)).square().sum(axes)
    # Counts of float32 would be rounded above 2**24.
    own = torch.cat([own_mean.double(), own_squares.double(), own_mean.new_tensor([count], dtype=torch.float64)])
    by_rank = allgather(own.unsqueeze(0), process_set=process_set)
    means, squares, counts = by_rank[:, :channels], by_rank[:, channels:-1], by_rank[:, -1:]
    total = counts.sum()
    mean = (counts * means).sum(0) / total.clamp(min=1)
    variance = (squares + counts * (means - mean).square()).sum(0) / total.clamp(min=1)
    return mean.to(inputs.dtype), variance.to(inputs.dtype), int(total)


class _Normalization(torch.autograd.Function):
    """(x - mean) / std, where mean and std depend on the inputs of all ranks."""

    @staticmethod
    def forward(
        ctx: Any, inputs: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, count: int, layer: "SyncBatchNorm"
    ) -> torch.Tensor:
        shape = [1, -1, *[1] * (inputs.dim() - 2)]
        normalized = (inputs.to(mean.dtype) - mean.view(shape)) * scale.view(shape)
        ctx.save_for_backward(normalized, scale)
        ctx.count, ctx.process_set, ctx.dtype = count, layer.process_set, inputs.dtype
        return normalized

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        normalized, scale = ctx.saved_tensors
        axes = [axis for axis in range(gradient.dim()) if axis != 1]
        shape = [1, -1, *[1] * (gradient.dim() - 2)]
        # d(loss)/dx = scale * (g - mean(g) - y * mean(g y)), with means over all ranks' batches.
        sums = torch.stack([gradient.sum(axes), (gradient * normalized).sum(axes)])
        of_gradient, of_product = allreduce_(sums, op=Sum, process_set=ctx.process_set) / ctx.count
        centered = gradient - of_gradient.view(shape) - normalized * of_product.view(shape)
        return (centered * scale.view(shape)).to(ctx.dtype), None, None, None, None
