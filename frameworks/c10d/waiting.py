"""How a rank waits for others inside an operation: at a growing interval, and never longer than the timeout."""

import os
import time
from collections.abc import Callable

from torch.distributed import DistBackendError

__all__ = ["Waiting"]

SPIN_SECONDS = 5e-4
"""The processor is only yielded for this time after the start of a wait that spins; then the thread sleeps."""
WORK_SECONDS = 1e-4
"""If a longer time has passed since the last poll, data have moved: what the rank waits for now is something else."""
PAUSES = ((4e-4, 5e-5), (0.02, 1.5e-4), (1.0, 5e-4), (float("inf"), 5e-3))
"""Pairs of a time since the start of a wait, and the pause between two polls until then, in seconds."""
LOOK_SECONDS = 0.5
"""Interval at which a rank that waits asks whether another one has failed."""


class Waiting:
    """What a transport calls while it waits (``Interruptible.while_waiting``).

    Args:
        failure: returns what has happened on another rank for which it will never arrive; None if nothing is known.
        spins: whether the first polls of a wait follow each other without a pause. Within a node, messages take
            less time than a pause. Between nodes they take longer, and a thread that has slept is preferred by the
            scheduler when it wakes up: on a busy processor, one that yields loses whole time slices.
    """

    def __init__(self, failure: Callable[[], str | None], *, spins: bool) -> None:
        self._failure = failure
        self._spin_seconds = SPIN_SECONDS if spins else 0.0
        self._description = ""
        self._started = self._limit = 0.0
        self._wait_started = self._last_poll = 0.0
        self._next_look = 0.0
        self._stopped: str | None = None

    def begin(self, description: str, timeout_seconds: float) -> None:
        """Begin an operation, whose waits end after ``timeout_seconds`` altogether."""
        self._description = description
        self._started = time.monotonic()
        self._limit = timeout_seconds
        self._next_look = LOOK_SECONDS

    def stop(self, reason: str) -> None:
        """End this wait, and all that follow, by an error. Any thread may call this.

        Args:
            reason: why, as a part of a sentence.
        """
        self._stopped = reason

    def __call__(self) -> None:
        now = time.monotonic()
        if now - self._last_poll > WORK_SECONDS:
            self._wait_started = now
        self._pause(now - self._started, now - self._wait_started)
        self._last_poll = time.monotonic()

    def _pause(self, taken: float, waited: float) -> None:
        """Pause between two polls.

        Args:
            taken: seconds since the start of the operation.
            waited: seconds since the start of this wait.
        """
        if self._stopped is not None:
            raise DistBackendError(f"{self._description} cannot be completed: {self._stopped}")
        if taken > self._limit:
            raise DistBackendError(
                f"{self._description} has reached its timeout of {self._limit:g} s: other ranks have not called "
                "it, or have stopped"
            )
        if taken > self._next_look:  # also on a busy machine, on which every wait seems to have just started
            self._next_look = taken + LOOK_SECONDS
            failed = self._failure()
            if failed is not None:
                raise DistBackendError(f"{self._description} cannot be completed: {failed}")
        if waited < self._spin_seconds:
            os.sched_yield()
            return
        time.sleep(next(pause for until, pause in PAUSES if waited < until))
