"""How much the clocks of ranks differ, measured by messages."""

import time
from dataclasses import dataclass

import numpy as np

from lentando.comm.transport import Transport

__all__ = ["ClockOffset", "measure_clock"]

ROUNDS = 10
"""Number of questions to rank 0; the answer that was the fastest counts (Cristian, Distributed Computing 1989)."""


@dataclass(frozen=True)
class ClockOffset:
    """The difference between the clock of rank 0 and that of this rank (``time.perf_counter``).

    Attributes:
        seconds: what must be added to this rank's clock.
        uncertainty_seconds: the most by which that may be wrong.
    """

    seconds: float
    uncertainty_seconds: float


def measure_clock(transport: Transport) -> ClockOffset:
    """Measure by how much this rank's clock differs from that of rank 0. Collective.

    Each rank asks rank 0 for its time. The answer was given at some moment between question and answer: half the time
    between them is the uncertainty.
    """
    now = np.zeros(1)
    best = ClockOffset(0.0, 0.0 if transport.rank == 0 else float("inf"))
    for rank in range(1, transport.size):
        for _ in range(ROUNDS if transport.rank in (0, rank) else 0):
            if transport.rank == 0:
                transport.exchange([], [(rank, np.zeros(1))], overlap=False).wait()
                now[0] = time.perf_counter()
                transport.exchange([(rank, now)], [], overlap=False).wait()
                continue
            asked = time.perf_counter()
            transport.exchange([(0, np.zeros(1))], [], overlap=False).wait()
            transport.exchange([], [(0, now)], overlap=False).wait()
            answered = time.perf_counter()
            uncertainty = (answered - asked) / 2
            if uncertainty < best.uncertainty_seconds:
                best = ClockOffset(float(now[0]) - (asked + answered) / 2, uncertainty)
    return best
