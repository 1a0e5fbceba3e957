"""Measures the time of each operation on the ranks of this job, with the code that training runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from lentando.comm.agreement import CONTROL_MESSAGE_BYTES, Event, Intent, agree
from lentando.comm.capabilities import VirtualTime, shares_memory
from lentando.comm.flat import Entry, FlatBuffer, build_layouts
from lentando.comm.transport import Transport
from lentando.optimizers.planning.records import Measurement, Points
from lentando.optimizers.rules.algorithm_hooks import hooks_of
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import OSGP, SGP
from lentando.optimizers.rules.outer_step import OuterStep
from lentando.optimizers.rules.slow_momentum import SlowMomentum

__all__ = ["measure_delays"]

CACHE_BYTES = 16 * 1024 * 1024
"""Bytes that are written before each measurement: between two communications, training replaces the caches' content."""
FRACTIONS = (64, 16, 4, 1)
"""Latency and bandwidth are fitted to models smaller by these factors."""
WARM_UP = 2


def measure_delays(
    transport: Transport, elements: int, dtype: str = "float32", repeats: int = 20, slow_momentum: float = 0.5
) -> Measurement:
    """Measure the delays of one model on these ranks, and of smaller models. Collective: every rank calls it.

    A barrier precedes each measurement, which therefore contains no wait for late ranks. A delay is the median over
    ``repeats`` of the mean over ranks.

    Args:
        transport: transport that connects the ranks to measure.
        elements: number of parameters.
        dtype: dtype of the parameters.
        repeats: number of measurements of each operation and size.
        slow_momentum: slow momentum of the outer step that is compared with one without.
    """
    clock = _Stopwatch(transport, repeats)
    delays: dict[str, Points] = {"control": [(CONTROL_MESSAGE_BYTES, clock.median(lambda: _control(transport)))]}
    for fraction in FRACTIONS:
        count = max(1, elements // fraction)
        (layout,) = build_layouts([Entry("parameters", (count,), dtype, 0)])
        buffer = FlatBuffer(layout, shared=shares_memory(transport))
        buffer.array[:] = 1
        size_bytes = buffer.array.nbytes
        for name, seconds in _operations(transport, buffer, clock, slow_momentum).items():
            points = delays.setdefault(name, [])
            if not points or points[-1][0] < size_bytes:
                points.append((size_bytes, seconds))
    return Measurement(size=transport.size, model_bytes=elements * buffer.array.itemsize, delays=delays)


def _operations(
    transport: Transport, buffer: FlatBuffer, clock: "_Stopwatch", slow_momentum: float
) -> dict[str, float]:
    gradients = AllReduce().bind(transport, [], [buffer])
    plain, slow = (OuterStep(transport, [buffer], rule) for rule in (None, SlowMomentum(1.0, slow_momentum)))
    for outer in (plain, slow):
        outer.reset_anchor()

    separate = buffer.array.copy()

    def average_gradients() -> None:
        np.copyto(buffer.array, separate)  # a framework's gradients are copied into the buffer and back
        _control(transport)
        gradients.average_gradients()
        np.copyto(separate, buffer.array)

    def step_outward(outer: OuterStep) -> None:
        _control(transport)
        outer.run([0.1])

    found = {
        "gradient_average": clock.median(average_gradients),
        "outer_step": clock.median(lambda: step_outward(plain)),
    }
    found["slow_momentum"] = max(0.0, clock.median(lambda: step_outward(slow)) - found["outer_step"])
    if transport.size > 1:
        gossip = SGP().bind(transport, [buffer], [])
        whole = clock.median(gossip.after_step)
        local = 0.0
        if not isinstance(transport, VirtualTime):  # in a simulation, arithmetic takes no time
            overlapped = OSGP(staleness=1, deterministic=True).bind(transport, [buffer], [])
            # After this pause, the message of the step before has arrived: only this rank's own work remains.
            local = min(whole, clock.median(overlapped.after_step, pause_seconds=4 * whole))
            hooks_of(overlapped).outer_average.wait_in_flight()
        found |= {"exchange": whole - local, "exchange_local": local}
    return found


def _control(transport: Transport) -> None:
    agree(transport, Intent(Event.OPERATION), lambda: "measures delays")


@dataclass
class _Stopwatch:
    transport: Transport
    repeats: int
    _cache: np.ndarray = field(default_factory=lambda: np.zeros(CACHE_BYTES, np.uint8))

    def median(self, operation: Callable[[], object], pause_seconds: float = 0.0) -> float:
        """Median time of an operation in seconds, equal on all ranks."""
        seconds = []
        for _ in range(WARM_UP + self.repeats):
            self._cache += 1
            if pause_seconds:
                time.sleep(pause_seconds)
            self.transport.barrier()
            started = self.transport.clock()
            operation()
            seconds.append(self.transport.clock() - started)
        over_ranks = self.transport.allgather(np.array(seconds[WARM_UP:])).mean(axis=0)
        return float(np.median(over_ranks))
