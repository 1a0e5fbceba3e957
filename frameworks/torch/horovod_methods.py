"""Methods that Horovod's ``DistributedOptimizer`` has for PyTorch, for programs that were written for it."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from lentando.optimizers.horovod_arguments import check_groups
from lentando.torch.gradient_averages import GradientAverages
from lentando.torch.model import TorchModel

__all__ = ["HorovodMethods"]


class HorovodMethods:
    """The part of a distributed optimizer that exists for programs which were written for Horovod.

    Subclasses set the attributes, and define ``synchronize`` and ``step``.
    """

    _model: TorchModel
    _gradients: GradientAverages
    _skips_synchronize = False

    @contextmanager
    def skip_synchronize(self) -> Iterator[None]:
        """Return a block for the ``step`` that follows ``synchronize``, for programs that were written for Horovod."""
        self._skips_synchronize = True
        try:
            yield
        finally:
            self._skips_synchronize = False

    @property
    def backward_passes_per_step(self) -> int:
        """Number of backward passes before each step."""
        return self._gradients.passes

    def set_backward_passes_per_step(self, passes: int) -> None:
        """Set the number of backward passes before each step, from the next step on."""
        check_groups(passes, 0, None, torch.Tensor)
        self._gradients.passes = passes

    @property
    def _parameter_names(self) -> dict[torch.Tensor, str]:
        """The name of each parameter, under the name by which programs find it in Horovod's optimizer."""
        return self._model.names()

    def _warn_of_second_reduction(self) -> None:
        warnings.warn(
            "optimizer.step() called without optimizer.skip_synchronize() after optimizer.synchronize(): Horovod "
            "reduces the gradients again here, Lentando uses them as they are. Put step() into a block with "
            "optimizer.skip_synchronize(), which means the same in both",
            stacklevel=3,
        )
