"""Executes asynchronous operations; small sums of one dtype are formed together, in one buffer."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lentando.comm.array_module import is_on_host
from lentando.comm.asynchronous.handle import Call
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import LentandoError, TransportError
from lentando.comm.reductions.rank_order import RankOrderSums
from lentando.comm.summation import Summation
from lentando.comm.transport import Array, Transport

__all__ = ["Execution"]

FUSED_BYTES = 32 * 1024 * 1024
"""The longest buffer in which sums are formed together."""
ALONE_FROM_BYTES = 1024 * 1024
"""Longer arrays are summed in place: to copy them costs more than a round of messages."""


class Execution:
    """Executes operations over one transport.

    Args:
        transport: transport that no other code uses.
    """

    def __init__(self, transport: Transport) -> None:
        self._transport = transport
        self._sums = RankOrderSums(transport)

    def run(self, calls: Sequence[Call[Any]]) -> Iterator[tuple[Sequence[int], Sequence[Any]]]:
        """Execute calls that all ranks make in this order.

        Yields:
            Numbers of calls that are complete, and for each its result, or the error that all ranks raise.

        Raises:
            Exception: an error that this rank alone may have; the other ranks may be waiting in the operation.
        """
        waiting: dict[np.dtype[Any], list[tuple[int, Summation]]] = {}
        for number, call in enumerate(calls):
            summation = call.summation
            if summation is None or not all(is_on_host(array) for array in summation.arrays):
                yield [number], [self._execute(call)]
                continue
            dtype = accumulator_dtype(summation.arrays[0].dtype)
            together = waiting.setdefault(dtype, [])
            together.append((number, summation))
            if sum(_bytes(other, dtype) for _, other in together) >= FUSED_BYTES:
                yield self._sum(together, dtype)
                del waiting[dtype]
        for dtype, together in waiting.items():
            yield self._sum(together, dtype)

    def _execute(self, call: Call[Any]) -> Any:
        try:
            return call.execute(self._transport)
        except TransportError:
            raise
        except LentandoError as error:
            return error

    def _sum(
        self, together: Sequence[tuple[int, Summation]], dtype: np.dtype[Any]
    ) -> tuple[Sequence[int], Sequence[Any]]:
        size = self._transport.size
        packed: list[tuple[Array, Summation]] = []
        for _, summation in together:
            for array in summation.arrays:
                summation.scale_before(array)
                if array.nbytes >= ALONE_FROM_BYTES and array.dtype == dtype:
                    self._sums.sum_in_place(array.reshape(-1))
                    summation.finish(array, array, size)
                elif array.size:
                    packed.append((array, summation))
        elements = sum(array.size for array, _ in packed)

        def pack(buffer: Array) -> None:
            start = 0
            for array, _ in packed:
                buffer[start : start + array.size] = array.reshape(-1)
                start += array.size

        if elements:
            total, start = self._sums.sum_packed(elements, dtype, pack), 0
            for array, summation in packed:
                summation.finish(total[start : start + array.size], array, size)
                start += array.size
        return [number for number, _ in together], [None] * len(together)


def _bytes(summation: Summation, dtype: np.dtype[Any]) -> int:
    return sum(array.size for array in summation.arrays) * dtype.itemsize
