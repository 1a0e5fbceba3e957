"""How a thread waits for messages of other ranks: it polls, at intervals that grow while nothing arrives."""

import os
import time

__all__ = ["Pace", "sleep"]

SPIN_SECONDS = 1e-3
"""If the program waits for the result, MPI is polled without sleeping for this time since the last progress."""
EXECUTING_SPIN_SECONDS = 0.25
"""The same while an operation is executed, for which no rank has to arrive any more."""
CROWDED_SPIN_SECONDS = 2e-4
"""The same in both cases if the node has more ranks than cores: one that polls takes the core of one that works."""
CROWDED_PAUSE_SECONDS = 5e-5
"""The first pause on such a node, where waits are short because the others then have the core."""
PAUSES = ((0.02, 1e-4), (1.0, 1e-3), (float("inf"), 5e-3))
"""Pairs of a time since the last progress, and the pause between two polls until then, in seconds."""
PAUSE_BEHIND_COMPUTATION = 5e-4
"""The least pause while the program computes: polling would take its processor."""


class Pace:
    """The pause until the next poll, by the time since something has happened.

    Args:
        is_crowded: whether this node has more ranks than cores.
    """

    def __init__(self, *, is_crowded: bool = False) -> None:
        self._is_crowded = is_crowded
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
        spin = EXECUTING_SPIN_SECONDS if is_executing else SPIN_SECONDS
        if is_urgent and waited < (CROWDED_SPIN_SECONDS if self._is_crowded else spin):
            return 0.0
        if self._is_crowded and is_urgent and waited < PAUSES[0][0]:
            return CROWDED_PAUSE_SECONDS
        pause = next(pause for until, pause in PAUSES if waited < until)
        return pause if is_urgent else max(pause, PAUSE_BEHIND_COMPUTATION)


def sleep(seconds: float) -> None:
    """Sleep, or only let other processes and threads have the processor if the time is 0."""
    if seconds:
        time.sleep(seconds)
    else:
        os.sched_yield()
