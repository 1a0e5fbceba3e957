"""How a thread waits for messages of other ranks: it polls, at intervals that grow while nothing arrives."""

import os
import time

__all__ = ["Pace", "sleep"]

SPIN_SECONDS = 1e-3
"""If the program waits for the result, MPI is polled without sleeping for this time since the last progress."""
EXECUTING_SPIN_SECONDS = 0.25
"""The same while an operation is executed, for which no rank has to arrive any more."""
PAUSES = ((0.02, 1e-4), (1.0, 1e-3), (float("inf"), 5e-3))
"""Pairs of a time since the last progress, and the pause between two polls until then, in seconds."""
PAUSE_BEHIND_COMPUTATION = 5e-4
"""The least pause while the program computes: polling would take its processor."""


class Pace:
    """The pause until the next poll, by the time since something has happened."""

    def __init__(self) -> None:
        self._since = time.monotonic()

    def reset(self) -> None:
        """Note that something has happened."""
        self._since = time.monotonic()

    @property
    def waited_seconds(self) -> float:
        """Time since something has happened."""
        return time.monotonic() - self._since

    def pause_seconds(self, *, is_urgent: bool, is_executing: bool = False) -> float:
        """How long to sleep before the next poll.

        Args:
            is_urgent: whether the program waits for the result, and does not compute.
            is_executing: whether all ranks are executing an operation.
        """
        waited = self.waited_seconds
        if is_urgent and waited < (EXECUTING_SPIN_SECONDS if is_executing else SPIN_SECONDS):
            return 0.0
        pause = next(pause for until, pause in PAUSES if waited < until)
        return pause if is_urgent else max(pause, PAUSE_BEHIND_COMPUTATION)


def sleep(seconds: float) -> None:
    """Sleep, or only let other processes and threads have the processor if the time is 0."""
    if seconds:
        time.sleep(seconds)
    else:
        os.sched_yield()
