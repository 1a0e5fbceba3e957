"""Synchronous SGD: gradients are averaged over all replicas before each step."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import inf
from typing import ClassVar, get_args

import numpy as np

from lentando.comm.checks import check_choice, check_flag
from lentando.comm.collectives import Algorithm
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatBuffer
from lentando.comm.operations import Average, Op, Sum
from lentando.comm.transport import Transport
from lentando.optimizers.rules.base_algorithm import BoundAlgorithm
from lentando.optimizers.rules.coded_gradients import CodedGradients
from lentando.optimizers.rules.gradient_buckets import plan_buckets
from lentando.optimizers.rules.overlapped_gradients import OverlappedGradients
from lentando.optimizers.rules.rounding import SixteenBits
from lentando.optimizers.rules.whole_gradients import WholeGradients
from lentando.optimizers.rules.wire import WireDtype, check_wire_dtype, wire_of

__all__ = ["AllReduce"]

SUMMED_AS_SENT = (None, *get_args(SixteenBits))
"""Values of ``wire_dtype`` with which the backend's reductions form the sum. Others are decoded before."""


@dataclass(frozen=True)
class AllReduce:
    """Synchronous SGD: gradients are averaged over all replicas before each step, as Horovod and DDP do.

    Args:
        algorithm: algorithm of the all-reduce, one of those of ``lentando.comm.collectives.plan_reduction``.
        overlap: whether to average gradients in buckets while the backward pass still computes others, with memory for
            one more copy of them. This works in PyTorch, on CPUs, with an MPI that supports threads
            (``MPI_THREAD_MULTIPLE``). Over other transports, in elastic jobs and inside ``join``, it has no effect.
            None, the default, overlaps where that is possible and the ranks are on several nodes; on one node it would
            take the cores that compute. All ranks decide alike. In Keras, on GPUs, and with ``op=Sum``, ``wire_dtype``
            or ``predivide_factor``, True is an error, and None means False.
            A gradient that is changed between the backward pass and ``step()`` (clipping, a ``GradScaler``, another
            backward pass) is detected, and all gradients are averaged again, which costs more than no overlap: call
            ``synchronize()`` before clipping, and run all backward passes of a step but the last inside ``no_sync()``.
            With None, overlap is given up once that has happened in a quarter of the steps, or a gradient is sparse,
            which is an error with True. Gradients that are zeroed in place are not sent before ``step()``: leave
            ``set_to_none`` at its default.
            No bit of a result depends on which steps have overlapped. On two ranks, none depends on this argument; on
            more, buckets add the ranks' terms of some elements in another order than ``overlap=False``. A checkpoint
            may be resumed with another value.
        bucket_bytes: least size of a bucket in bytes, with ``overlap``; None for 192 KiB for each rank, at most 25 MiB,
            and 25 MiB on one node. A checkpoint may be resumed with another value.
        op: ``Average``, or ``Sum`` for the sum over the ranks.
        wire_dtype: "bfloat16" or "float16", to which gradients are rounded before they are sent, which halves the bytes
            of float32; or "int8" or "int4", a quarter or an eighth of the bytes, with error feedback: each rank adds
            what rounding has left out to its next gradients (``lentando.optimizers.rules.coded_gradients``; 8 bytes
            more memory for each parameter of float32, and for messages 2 bytes with "int8" and 1 with "int4"). None
            sends gradients unrounded.
        predivide_factor: factor, > 0, by which gradients are divided before the average and multiplied after it, which
            keeps large sums within the range of 16 bits.

    Raises:
        ConfigurationError: if ``bucket_bytes`` is neither None nor an integer >= 1, ``algorithm``, ``op`` or
            ``wire_dtype`` is unknown, ``predivide_factor`` is not > 0 or is combined with ``Sum`` or integers, or
            ``overlap=True`` is combined with any of the last three; from ``bind``, for integers in an elastic job.

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
    overlap: bool | None = None
    bucket_bytes: int | None = None
    op: Op = Average
    wire_dtype: WireDtype | None = None
    predivide_factor: float = 1.0

    averages_gradients: ClassVar[bool] = True
    communicates: ClassVar[bool] = True
    mixes_parameters: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_choice("algorithm", self.algorithm, get_args(Algorithm))
        if self.overlap is not None:
            check_flag("overlap", self.overlap)
        size = self.bucket_bytes
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ConfigurationError(f"bucket_bytes must be an integer > 0 or None, got {size!r}")
        if self.op not in (Average, Sum):
            raise ConfigurationError(f"op of gradients must be Average or Sum, got {self.op!r}")
        check_wire_dtype(self.wire_dtype)
        if not (isinstance(self.predivide_factor, int | float) and 0 < self.predivide_factor < inf):
            raise ConfigurationError(f"predivide_factor must be a number > 0, got {self.predivide_factor!r}")
        if self.predivide_factor != 1 and self.op is not Average:
            raise ConfigurationError("predivide_factor divides an average in two steps: leave it out with op=Sum")
        if self.predivide_factor != 1 and self.wire_dtype not in SUMMED_AS_SENT:
            raise ConfigurationError(
                f"predivide_factor has no use with wire_dtype={self.wire_dtype!r}, which scales blocks: leave it out"
            )
        if self.overlap and not self._averages_as_they_are:
            raise ConfigurationError(
                "overlap=True averages gradients as they are: leave it out with op=Sum, wire_dtype or predivide_factor"
            )

    @property
    def _averages_as_they_are(self) -> bool:
        return (self.op, self.wire_dtype, self.predivide_factor) == (Average, None, 1)

    def bind(
        self,
        transport: Transport,
        parameters: Sequence[FlatBuffer],
        gradients: Sequence[FlatBuffer],
        fills_buckets: bool = False,
    ) -> BoundAlgorithm:
        """Plan the averages of these gradients. Collective.

        Args:
            transport: transport that connects the ranks that train together.
            parameters: flat buffers of the model.
            gradients: flat buffers of the gradients, laid out by ``gradient_layouts``.
            fills_buckets: whether this rank's adapter fills buckets during the backward pass
                (``lentando.optimizers.framework.OverlappingFramework``); decides only with ``overlap=None``.
        """
        if self.wire_dtype not in SUMMED_AS_SENT:
            return CodedGradients(transport, parameters, gradients, self.op is Sum, wire_of(self.wire_dtype))
        whole = WholeGradients(
            transport, gradients, self.algorithm, self.op is Sum, self.wire_dtype, self.predivide_factor
        )
        if not (self.overlap or self._chooses_overlap(transport, fills_buckets)):
            return whole
        buckets = plan_buckets(transport, gradients, self.algorithm, self.bucket_bytes, self.overlap is None)
        return whole if buckets is None else OverlappedGradients(transport, gradients, buckets, whole)

    def _chooses_overlap(self, transport: Transport, fills_buckets: bool) -> bool:
        """Whether gradients overlap although the user has not asked for it, the same on all ranks."""
        if self.overlap is not None or not self._averages_as_they_are or transport.local_size == transport.size:
            return False
        return bool(transport.allgather(np.array([fills_buckets], np.uint8)).all())
