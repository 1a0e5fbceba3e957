"""The average or sum of all gradients at once, buffer by buffer, which may be sent in 16 bits."""

import os
from collections.abc import Sequence

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.dtypes import numpy_dtype
from lentando.comm.flat import FlatBuffer
from lentando.comm.reductions.node import NodeReduction
from lentando.comm.reductions.staged import LONG_PIECE_BYTES, StagedSums, staged_sums
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.base_algorithm import LARGE_ELEMENTS, BoundAlgorithm, SearchesGradients
from lentando.optimizers.rules.partial_average import PartialAverage, mean_over_some
from lentando.optimizers.rules.rounding import rounded_into
from lentando.optimizers.rules.wire import WireDtype

__all__ = ["WholeGradients"]


class WholeGradients(BoundAlgorithm, SearchesGradients):
    """Reduces the gradients of all parameters, after the backward pass.

    Args:
        transport: transport that connects the ranks that train together.
        gradients: flat buffers of the gradients.
        algorithm: algorithm of the all-reduce.
        is_sum: whether the sum over the ranks is formed, not the mean.
        wire_dtype: 16-bit dtype to which gradients are rounded before they are sent, or None.
        predivide_factor: factor by which gradients are divided before the average and multiplied after it.
    """

    def __init__(
        self,
        transport: Transport,
        gradients: Sequence[FlatBuffer],
        algorithm: Algorithm,
        is_sum: bool,
        wire_dtype: WireDtype | None,
        predivide_factor: float,
    ) -> None:
        self._transport, self._size = transport, transport.size
        self._gradients = gradients
        self._is_sum = is_sum
        self._predivide_factor = predivide_factor
        self._sent = [_sent(buffer.array, wire_dtype) for buffer in gradients]
        self._reductions = [plan_reduction(transport, array, algorithm) for array in self._sent]
        self._staged = [_staged(transport, buffer) for buffer in gradients]
        self._searching = [each for each in self._reductions if isinstance(each, NodeReduction) and each.is_within_node]
        is_changed = predivide_factor != 1 or any(
            sent is not buffer.array for buffer, sent in zip(gradients, self._sent, strict=True)
        )
        self._can_search = not is_changed and len(self._searching) == len(self._reductions)
        self._takes_parts = (
            self._can_search
            and any(self._staged)
            and all(staged or not _has_large(buffer) for staged, buffer in zip(self._staged, gradients, strict=True))
        )

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        for buffer, sent, reduction in zip(self._gradients, self._sent, self._reductions, strict=True):
            array, is_rounded, factor = buffer.array, sent is not buffer.array, self._predivide_factor
            if factor != 1:
                array /= factor
            if is_rounded:
                rounded_into(sent, array)
            sums_at_once = self._is_sum and not is_rounded  # a sum of many ranks may exceed the range of 16 bits
            if partial_average is None:
                reduction.all_reduce(mean=not sums_at_once)
            else:
                mean_over_some(reduction, sent, partial_average)
            if is_rounded:
                array_module(array).copyto(array, sent)
            if factor != 1:
                array *= factor
            if self._is_sum and partial_average is not None:
                array *= partial_average.active_ranks
            elif self._is_sum and is_rounded:
                array *= self._size

    @property
    def can_search(self) -> bool:
        return self._can_search

    @property
    def takes_parts(self) -> bool:
        return self._takes_parts

    def average_and_search(self, parts: Sequence[Sequence[Array]] | None = None) -> Sequence[str | None]:
        names: list[str | None] = [None] * self._size
        for number, buffer in enumerate(self._gradients):
            staged, is_mean = self._staged[number], not self._is_sum
            if parts is None or staged is None:
                firsts = self._searching[number].all_reduce_and_search(is_mean)
            else:
                firsts = staged.all_reduce_and_search(self._transport, parts[number], mean=is_mean)
            for rank, first in enumerate(firsts.tolist()):
                if names[rank] is None and first < buffer.array.size:
                    names[rank] = buffer.layout.entry_at(first).name
        return names


def _staged(transport: Transport, buffer: FlatBuffer) -> StagedSums | None:
    """Sums of gradients that stay where they are, if that is faster than to copy them. Collective.

    Where ranks share cores, each pass of a piece through the staging memory costs more than it saves.
    """
    if not _has_large(buffer) or transport.local_size > (os.cpu_count() or 1):
        return None
    return staged_sums(transport, buffer.array, LONG_PIECE_BYTES)


def _has_large(buffer: FlatBuffer) -> bool:
    return any(entry.size >= LARGE_ELEMENTS for entry in buffer.layout.entries)


def _sent(array: Array, wire_dtype: WireDtype | None) -> Array:
    """The array that is sent: the gradients themselves, or an array of 16 bits where that is smaller."""
    if wire_dtype is None or array.dtype not in (np.float32, np.float64):
        return array
    sent: Array = array_module(array).empty_like(array, dtype=numpy_dtype(wire_dtype))
    return sent
