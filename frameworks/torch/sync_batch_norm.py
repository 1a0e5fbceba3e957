"""Batch normalization with the statistics of all ranks' batches."""

from typing import Any

import torch
from torch.nn.functional import batch_norm

from lentando.comm.errors import ConfigurationError
from lentando.comm.process_sets import ProcessSet, global_process_set

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
        from lentando.torch.batch_statistics import normalized_by_all  # loads PyTorch's compiler

        outputs: torch.Tensor = normalized_by_all(self, input, momentum)
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
