"""Batch normalization with the statistics of all ranks' batches."""

from typing import Any

import torch
from torch.nn.functional import batch_norm

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Sum
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.torch.functions.gathering import allgather
from lentando.torch.functions.reducing import allreduce_

__all__ = ["SyncBatchNorm"]


class SyncBatchNorm(torch.nn.SyncBatchNorm):
    """Batch normalization over the batches of all ranks together, instead of each rank's own batch.

    Results and gradients are those of ``torch.nn.BatchNorm1d`` (``2d``, ``3d``) on the concatenated batches, which may
    differ in length between ranks. Unlike Horovod's it also runs on CPUs. The name of the base class is PyTorch's;
    ``torch.distributed`` is not used.

    In training mode each forward pass and each backward pass is a collective, so that all ranks take the same number.
    In evaluation mode nothing is sent, and one rank can evaluate alone, except with ``track_running_stats=False``: the
    layer then uses the statistics of the batches of all ranks in evaluation, too, as Horovod's does.
    The gradients of weight and bias are this rank's own, as those of any other layer.

    Args:
        num_features: number of channels C of inputs of shape (N, C, ...).
        eps: number that is added to the variance.
        momentum: weight of a batch in the running statistics; None for their plain mean over all batches.
        affine: whether there are trainable ``weight`` and ``bias``.
        track_running_stats: whether there are running statistics, which evaluation uses.
        process_set: the ranks whose batches are normalized together.

    Example:
        >>> import lentando.torch as lt
        >>> lt.init()
        >>> layer = lt.SyncBatchNorm(1, affine=False)
        >>> layer(torch.tensor([[1.0], [3.0]])).round(decimals=2).tolist()
        [[-1.0], [1.0]]
        >>> lt.shutdown()
    """

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        *,
        process_set: ProcessSet = global_process_set,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        self.process_set = process_set

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - PyTorch's name
        """Normalize a batch. Collective in training mode.

        Args:
            input: tensor of shape (N, C, ...).
        """
        if input.dim() < 2 or input.shape[1] != self.num_features:
            raise ConfigurationError(
                f"SyncBatchNorm expects an input of shape (N, {self.num_features}, ...), got {list(input.shape)}"
            )
        momentum = 0.0 if self.momentum is None else self.momentum
        if self.training and self.num_batches_tracked is not None:
            self.num_batches_tracked.add_(1)
            if self.momentum is None:
                momentum = 1.0 / float(self.num_batches_tracked)
        uses_batch = self.training or self.running_mean is None or self.running_var is None
        if not uses_batch or self.process_set.size() == 1:
            return batch_norm(
                input, self.running_mean, self.running_var, self.weight, self.bias, uses_batch, momentum, self.eps
            )
        outputs: torch.Tensor = _normalized(self, input, momentum)
        return outputs

    @classmethod
    def convert_sync_batchnorm(cls, module: torch.nn.Module, process_group: Any = None) -> torch.nn.Module:
        """Replace the batch normalizations (``BatchNorm1d``, ``2d``, ``3d``) within a module by layers of this class.

        Parameters and statistics are kept, as the same tensors.

        Args:
            module: a module.
            process_group: a ``ProcessSet``; all ranks by default.

        Returns:
            The module, or the new layer if it is a batch normalization itself.
        """
        kinds = (torch.nn.BatchNorm1d, torch.nn.BatchNorm2d, torch.nn.BatchNorm3d)
        if isinstance(module, kinds):
            layer = cls(
                module.num_features,
                module.eps,
                module.momentum,
                module.affine,
                module.track_running_stats,
                process_set=process_group or global_process_set,
            )
            for name, parameter in module.named_parameters(recurse=False):
                layer.register_parameter(name, parameter)
            for name, buffer in module.named_buffers(recurse=False):
                layer.register_buffer(name, buffer)
            return layer.train(module.training)
        for name, child in module.named_children():
            module.register_module(name, cls.convert_sync_batchnorm(child, process_group))
        return module


@torch.compiler.disable  # type: ignore[untyped-decorator]  # communication cannot be compiled
def _normalized(layer: SyncBatchNorm, inputs: torch.Tensor, momentum: float) -> torch.Tensor:
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
        ctx: Any, inputs: torch.Tensor, mean: torch.Tensor, scale: torch.Tensor, count: int, layer: SyncBatchNorm
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
