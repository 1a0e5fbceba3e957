"""Executes asynchronous operations; small sums (or means) of one dtype are formed together, in one buffer."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from lentando.comm import timeline
from lentando.comm.array_module import is_on_host
from lentando.comm.asynchronous.handle import Call, tensor_name
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import LentandoError, TransportError
from lentando.comm.reductions.rank_order import RankOrderSums
from lentando.comm.reductions.reduction import quiet
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
        waiting: dict[tuple[np.dtype[Any], bool], _Together] = {}
        for number, call in enumerate(calls):
            summation = call.summation
            if summation is None or not all(is_on_host(array) for array in summation.arrays):
                yield [number], [self._execute(call)]
                continue
            kind = accumulator_dtype(summation.arrays[0].dtype), summation.is_mean
            together = waiting.get(kind)
            if together is None:
                together = waiting[kind] = _Together(*kind)
            together.add(number, call, summation)
            if together.nbytes >= FUSED_BYTES:
                yield together.numbers, self._execute_together(waiting.pop(kind))
        for together in waiting.values():
            yield together.numbers, self._execute_together(together)

    def _execute(self, call: Call[Any]) -> Any:
        try:
            execute = timeline.recorded(call.operation.upper(), call.execute, tensor=tensor_name(call))
            return execute(self._transport)
        except TransportError:
            raise
        except LentandoError as error:
            return error

    def _execute_together(self, together: "_Together") -> Sequence[Any]:
        calls = together.calls
        tensors = [tensor_name(call) for call in calls] if timeline.active is not None else []
        timeline.recorded(calls[0].operation.upper(), self._sum, tensors=tensors, bytes=together.nbytes)(together)
        return [None] * len(calls)

    def _sum(self, together: "_Together") -> None:
        packed: list[tuple[Array, Array, Summation]] = []
        for summation in together.summations:
            for array in summation.arrays:
                summation.scale_before(array)
                flat = array.reshape(-1)
                if array.nbytes >= ALONE_FROM_BYTES and array.dtype == together.dtype:
                    self._sums.sum_in_place(flat, mean=together.is_mean)
                    summation.scale_after(array)
                elif array.size:
                    packed.append((flat, array, summation))
        if not packed:
            return
        total = self._sums.sum_packed([flat for flat, _, _ in packed], together.dtype, mean=together.is_mean)
        start = 0
        with quiet():  # rounded to half precision, a value may be infinite
            for flat, array, summation in packed:
                stop = start + flat.size
                flat[...] = total[start:stop]
                start = stop
                summation.scale_after(array)


class _Together:
    """Sums that are formed together.

    Args:
        dtype: dtype in which they are formed.
        is_mean: whether they are divided by the number of ranks.
    """

    def __init__(self, dtype: np.dtype[Any], is_mean: bool) -> None:
        self.dtype = dtype
        self.is_mean = is_mean
        self.numbers: list[int] = []
        self.calls: list[Call[Any]] = []
        self.summations: list[Summation] = []
        self.nbytes = 0

    def add(self, number: int, call: Call[Any], summation: Summation) -> None:
        """Add a call, with its number among all that are executed."""
        self.numbers.append(number)
        self.calls.append(call)
        self.summations.append(summation)
        for array in summation.arrays:
            self.nbytes += array.size * self.dtype.itemsize
