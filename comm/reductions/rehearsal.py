"""Executes plans of a reduction on zeros, for ``tuning`` to measure them."""

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np

from lentando.comm.reductions.plan import ReductionPlan, build
from lentando.comm.reductions.reduction import store
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport

__all__ = ["REHEARSED_BYTES", "Rehearsal"]

REHEARSED_BYTES = 32 * 1024 * 1024
"""Size limit of the buffer that a measurement all-reduces."""


class Rehearsal:
    """Prepares plans for a measurement, on a buffer of zeros as large as the real one or ``REHEARSED_BYTES``.

    Args:
        transport: transport that connects the participating ranks.
        buffer: representative of the buffers to be reduced; not modified.
        default: the plan that is used if nothing is measured.
        scatter_gather: whether to execute a reduce-scatter and an all-gather, as an outer step does.
    """

    def __init__(self, transport: Transport, buffer: Array, default: ReductionPlan, scatter_gather: bool) -> None:
        self._transport = transport
        self._elements = min(buffer.size, REHEARSED_BYTES // buffer.itemsize)
        self._dtype = buffer.dtype
        self._is_shared = default.method == "shared memory"
        self._scatter_gather = scatter_gather

    @cached_property
    def _zeros(self) -> Array:
        return (shared_zeros if self._is_shared else np.zeros)(self._elements, self._dtype)

    def prepare(self, plan: ReductionPlan) -> Callable[[], object]:
        """A function that executes the plan once. Collective for "shared memory"."""
        zeros = self._zeros
        reduction = build(self._transport, zeros, plan)
        if not self._scatter_gather:
            return partial(reduction.all_reduce, mean=False)

        def outer_step() -> None:
            total = reduction.reduce_scatter()
            self._transport.barrier()  # stands for the question whether the average is finite
            store(total, zeros[reduction.shard], 1)
            reduction.all_gather()

        return outer_step
