"""The choice of ``delay="auto"``: the fewest inner steps behind which the measured average hides."""

from collections.abc import Sequence
from math import ceil, inf, isnan, nan
from typing import Any

import numpy as np

from lentando.comm.transport import Array

__all__ = ["DelayChoice", "hiding_delay"]

MEASURED = 3
"""Averages of each fragment that are measured, after the first one, which sets up memory and connections."""


def hiding_delay(average_seconds: float, step_seconds: float, longest: int) -> int:
    """Number of inner steps behind which an average hides: the smallest d with D <= d Y.

    Args:
        average_seconds: time of an average (D).
        step_seconds: time of an inner step (Y) of the fastest rank, which reaches the end of the delay first.
        longest: the largest delay that is possible. It is returned if no delay hides the average.

    Example:
        >>> hiding_delay(0.25, 0.1, longest=12), hiding_delay(25.0, 0.1, longest=12), hiding_delay(0.0, 0.1, longest=12)
        (3, 12, 0)
    """
    steps = average_seconds / step_seconds if step_seconds > 0 else inf if average_seconds > 0 else 0.0
    return longest if steps >= longest else ceil(steps)


class DelayChoice:
    """Measures the averages of the first rounds, and chooses the delay from what all ranks have measured.

    Args:
        fragments: number of fragments of the model.

    Attributes:
        chosen: the delay in inner steps; None until it is chosen.
        step_seconds: time of an inner step for the choice, the one that has decided once it is made; NaN if unknown.
    """

    def __init__(self, fragments: int) -> None:
        self.chosen: int | None = None
        self._fragments = fragments
        self._seconds: list[float] = []
        self.step_seconds = nan

    def add(self, seconds: float) -> None:
        """Note an average that has been formed.

        Args:
            seconds: time from the contribution of a fragment until its average was formed.
        """
        if self.chosen is None:
            self._seconds.append(seconds)

    def longest_seconds(self) -> float:
        """The longest of the measured times on this rank, NaN until enough averages have been measured."""
        if len(self._seconds) < self._fragments * (1 + MEASURED):
            return nan
        return max(self._seconds[self._fragments :])

    def choose(self, average_seconds: Array, step_seconds: Sequence[float] | Array, longest: int) -> int | None:
        """Choose, if all ranks have measured enough. The ranks choose alike, because all give the same numbers.

        The time of a step is that of the call before, if it was known then, which is part of the state: a run that is
        resumed between the last average that is measured and the choice chooses as if it had not been interrupted.

        Args:
            average_seconds: what ``longest_seconds`` has returned on each rank.
            step_seconds: mean compute time of an inner step on each rank; NaN where it is not known.
            longest: the largest delay that is possible.

        Returns:
            the delay; None if it cannot be chosen yet.
        """
        if self.chosen is None:
            latest = float(np.min(step_seconds))  # NaN if it is not known on all ranks
            if isnan(self.step_seconds):
                self.step_seconds = latest
            if not (np.isnan(average_seconds).any() or isnan(self.step_seconds)):
                self.chosen = hiding_delay(float(max(average_seconds)), self.step_seconds, longest)
            elif not isnan(latest):
                self.step_seconds = latest
        return self.chosen

    def state_dict(self) -> dict[str, Any]:
        """What has been chosen, and measured until then."""
        step_seconds = None if isnan(self.step_seconds) else self.step_seconds
        return {"chosen": self.chosen, "seconds": list(self._seconds), "step_seconds": step_seconds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from ``state_dict()``."""
        self.chosen, self._seconds = state["chosen"], list(state["seconds"])
        step_seconds = state.get("step_seconds")  # earlier checkpoints are without
        self.step_seconds = nan if step_seconds is None else step_seconds
