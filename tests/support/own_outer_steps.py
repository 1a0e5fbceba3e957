"""Two kinds of outer steps as a user would write them, in one file: an average that overlaps, and one of 8 bits."""

from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np

from lentando.comm.background import start_background_threads
from lentando.comm.collectives import plan_reduction
from lentando.comm.flat import FlatBuffer
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.flat_state import flat_state
from lentando.optimizers.rules.outer_stepping import OuterOptions, OuterStepping
from lentando.optimizers.rules.partial_average import PartialAverage


@dataclass(frozen=True)
class OverlapLocalSGD:
    """Pulls each replica towards the average of the round before, which is formed meanwhile (arXiv 2002.09539)."""

    pullback: float = 0.5
    needs_learning_rate = False

    def bind(self, transport: Transport, buffers: Sequence[FlatBuffer], options: OuterOptions) -> OuterStepping:
        return _Overlapped(transport, buffers, self.pullback)


class _Overlapped(OuterStepping):
    leaves_ranks_equal = False

    def __init__(self, transport: Transport, buffers: Sequence[FlatBuffer], pullback: float) -> None:
        self._buffers, self._pullback = buffers, pullback
        self._threads = start_background_threads(transport, 1, "overlapped-average")
        over = self._threads.transports[0] if self._threads else transport
        self._averages = [buffer.array.copy() for buffer in buffers]
        self._reductions = [plan_reduction(over, average, "ring") for average in self._averages]
        self._in_flight: Future[None] | None = None

    def _wait(self) -> None:
        future, self._in_flight = self._in_flight, None
        if future is not None:
            future.result()

    def reset_anchor(self, forget_momentum: bool = False) -> None:
        self._wait()
        for average, buffer in zip(self._averages, self._buffers, strict=True):
            average[...] = buffer.array

    def average(self, partial_average: PartialAverage | None = None) -> None:
        self._wait()

    def abort_average(self) -> None:
        return

    def step(self, learning_rates: Sequence[float]) -> None:
        for average, buffer in zip(self._averages, self._buffers, strict=True):
            buffer.array[...] += self._pullback * (average - buffer.array)
            average[...] = buffer.array
        reductions = self._reductions

        def reduce() -> None:
            for reduction in reductions:
                reduction.all_reduce(mean=True)

        if self._threads is None:
            reduce()
        else:
            self._in_flight = self._threads.submit(0, reduce)

    def adopt(self) -> None:
        self.reset_anchor()

    def state_dict(self) -> dict[str, Any]:
        self._wait()
        return {"averages": flat_state([average.copy() for average in self._averages])}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self._wait()
        for average, saved in zip(self._averages, state["averages"]["flat"], strict=True):
            average[...] = saved


@dataclass(frozen=True)
class EightBitAverage:
    """Averages what the round has changed, which each rank rounds to 127 steps of its largest change."""

    needs_learning_rate = False

    def bind(self, transport: Transport, buffers: Sequence[FlatBuffer], options: OuterOptions) -> OuterStepping:
        return _EightBit(transport, buffers)


class _EightBit(OuterStepping):
    supports_join = True

    def __init__(self, transport: Transport, buffers: Sequence[FlatBuffer]) -> None:
        self._transport, self._buffers = transport, buffers
        self._anchors = [buffer.array.copy() for buffer in buffers]
        self._means: list[Array] = []

    def reset_anchor(self, forget_momentum: bool = False) -> None:
        for anchor, buffer in zip(self._anchors, self._buffers, strict=True):
            anchor[...] = buffer.array

    def average(self, partial_average: PartialAverage | None = None) -> None:
        active = 1.0 if partial_average is None else float(partial_average.is_active)
        self._means = []
        for anchor, buffer in zip(self._anchors, self._buffers, strict=True):
            change = buffer.array - anchor
            scale = max(float(np.abs(change).max()), 1e-30) / 127
            scales = self._transport.allgather(np.array([scale * active, active]))
            sent = self._transport.allgather(np.rint(change / scale).astype(np.int8))
            self._means.append(anchor + scales[:, 0] @ sent.astype(np.float64) / scales[:, 1].sum())

    def abort_average(self) -> None:
        self._means = []

    def step(self, learning_rates: Sequence[float]) -> None:
        for mean, buffer in zip(self._means, self._buffers, strict=True):
            buffer.array[...] = mean
        self.reset_anchor()

    def adopt(self) -> None:
        self.step(())

    def state_dict(self) -> dict[str, Any]:
        return {"anchors": flat_state(self._anchors)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for anchor, saved in zip(self._anchors, state["anchors"]["flat"], strict=True):
            anchor[...] = saved
