"""Synchronous SGD: gradients are averaged over all replicas before each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, get_args

from lentando.comm.checks import check_choice, check_flag
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Transport
from lentando.optimizers.rules.base_algorithm import BoundAlgorithm
from lentando.optimizers.rules.gradient_buckets import OverlappedGradients, plan_buckets
from lentando.optimizers.rules.partial_average import PartialAverage, mean_over_some

__all__ = ["AllReduce"]


@dataclass(frozen=True)
class AllReduce:
    """Synchronous SGD: gradients are averaged over all replicas before each step, as Horovod and DDP do.

    Args:
        algorithm: algorithm of the all-reduce, one of those of ``lentando.comm.collectives.plan_reduction``.
        overlap: whether to average gradients in buckets while the backward pass still computes others. This works in
            PyTorch, on CPUs, with an MPI that supports threads (``MPI_THREAD_MULTIPLE``). Over other transports, and
            inside ``join``, it has no effect. A gradient that is changed between the backward pass and ``step()``
            (clipping, a ``GradScaler``, another backward pass) is detected, and all gradients are averaged again,
            which costs more than no overlap: call ``synchronize()`` before clipping, and run all backward passes of a
            step but the last inside ``no_sync()``. Gradients that are zeroed in place are not sent before ``step()``:
            leave ``set_to_none`` at its default.
        bucket_bytes: size of a bucket in bytes, with ``overlap``.

    Raises:
        ConfigurationError: if ``bucket_bytes`` is not an integer >= 1, or ``algorithm`` is unknown.

    Example:
        Two ranks, which are threads here, with gradients 0 and 1 of a parameter. The second number of each flat buffer
        says that the parameter has a gradient:

        >>> import numpy as np
        >>> from lentando.comm.flat import Entry, FlatBuffer, build_layouts
        >>> from lentando.comm.testing import run_ranks
        >>> from lentando.optimizers.rules.gradient_layout import gradient_layouts
        >>> (layout,) = gradient_layouts(build_layouts([Entry("w", (1,), "float64", 0)]))
        >>> def averaged(transport):
        ...     gradients = FlatBuffer(layout, np.array([transport.rank, 1.0]))
        ...     AllReduce().bind(transport, [], [gradients]).average_gradients()
        ...     return gradients.array.tolist()
        >>> run_ranks(2, averaged)
        [[0.5, 1.0], [0.5, 1.0]]
    """

    algorithm: Algorithm = "auto"
    overlap: bool = False
    bucket_bytes: int = 25 * 1024 * 1024

    averages_gradients: ClassVar[bool] = True
    communicates: ClassVar[bool] = True
    mixes_parameters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, get_args(Algorithm))
        check_flag("overlap", self.overlap)
        if not isinstance(self.bucket_bytes, int) or isinstance(self.bucket_bytes, bool) or self.bucket_bytes < 1:
            raise ConfigurationError(f"bucket_bytes must be an integer > 0, got {self.bucket_bytes!r}")

    def bind(
        self, transport: Transport, parameters: Sequence[FlatBuffer], gradients: Sequence[FlatBuffer]
    ) -> BoundAlgorithm:
        buckets = plan_buckets(transport, gradients, self.algorithm, self.bucket_bytes) if self.overlap else None
        whole = _AveragedGradients(transport, gradients, self.algorithm)
        return whole if buckets is None else OverlappedGradients(transport, gradients, buckets, whole)


class _AveragedGradients(BoundAlgorithm):
    """Averages all gradients at once, buffer by buffer."""

    def __init__(self, transport: Transport, gradients: Sequence[FlatBuffer], algorithm: Algorithm) -> None:
        self._gradients = gradients
        self._reductions = [plan_reduction(transport, buffer.array, algorithm) for buffer in gradients]

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        for buffer, reduction in zip(self._gradients, self._reductions, strict=True):
            if partial_average is None:
                reduction.all_reduce(mean=True)
            else:
                mean_over_some(reduction, buffer.array, partial_average)
