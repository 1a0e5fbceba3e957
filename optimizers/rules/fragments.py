"""Which parameters make up a fragment of the model, and after which steps each fragment is averaged.

Streaming DiLoCo (Douillard et al., arXiv 2501.18512) averages a fragment at a time, so that the link is used evenly:
fragment k of P is averaged after (k + 1) / P of the steps of each round, the last one at its end.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Literal, TypeAlias

from lentando.comm.checks import check_integer, is_number
from lentando.comm.errors import ConfigurationError
from lentando.comm.flat import FlatLayout

__all__ = ["Delay", "Streaming", "Timetable", "cut_layouts"]

Delay: TypeAlias = int | Literal["auto"]
"""Inner steps from a contribution to the adoption of its average; "auto" measures how many hide it."""


@dataclass(frozen=True)
class Streaming:
    """How outer steps are spread over time.

    Args:
        delay: inner steps from a contribution to the adoption of its average; "auto" measures how many hide it.
        fragments: number of fragments.
        blend: share of the rank's own parameters in what it adopts; None adds what it has moved meanwhile.

    Raises:
        ConfigurationError: if a value is out of its range.
    """

    delay: Delay = 0
    fragments: int = 1
    blend: float | None = None

    def __post_init__(self) -> None:
        if isinstance(self.delay, str):
            if self.delay != "auto":
                raise ConfigurationError(f'delay must be an integer >= 0 (inner steps) or "auto", got {self.delay!r}')
        else:
            check_integer("delay", self.delay, 0, "inner steps")
        check_integer("fragments", self.fragments, 1, "parts of the model")
        if self.blend is not None and not (is_number(self.blend) and 0 <= self.blend <= 1):
            raise ConfigurationError(f"blend must be None or a number from 0 to 1, got {self.blend!r}")

    @property
    def is_needed(self) -> bool:
        """Whether outer steps are not taken at once, and of the whole model."""
        return self != Streaming()

    def check_period(self, period: int) -> None:
        """Check that every fragment is adopted before it is contributed again.

        Args:
            period: inner steps of every round.

        Raises:
            ConfigurationError: if it is not.
        """
        if self.delay != "auto" and self.delay > period:
            raise ConfigurationError(
                f"delay must be at most the period, {period} inner steps, because the next average begins then: "
                f"got {self.delay}"
            )
        if self.fragments > period:
            raise ConfigurationError(
                f"fragments must be at most the period, {period} inner steps, so that each has a step of its own: "
                f"got {self.fragments}"
            )


@dataclass(frozen=True)
class Timetable:
    """After which steps of a round fragments are contributed to their averages, and adopted.

    Args:
        fragments: number of fragments.
        delay: inner steps from a contribution to the adoption of its average; None adopts it right before the fragment
            is contributed again.

    Example:
        >>> timetable = Timetable(fragments=2, delay=1)
        >>> [timetable.contributed_after(steps, round_steps=6) for steps in (3, 4, 6)]
        [[0], [], [1]]
        >>> timetable.adopted_after(4, round_steps=6, ages=[1, None])
        [0]
        >>> timetable.next_after(3, round_steps=6, ages=[0, None])
        4
    """

    fragments: int
    delay: int | None

    def contributed_after(self, steps: int, round_steps: int) -> list[int]:
        """Fragments that are contributed after so many steps of a round.

        Args:
            steps: steps of the round that have been taken.
            round_steps: length of the round.
        """
        return [number for number, due in enumerate(self._due(round_steps)) if due == steps]

    def adopted_after(self, steps: int, round_steps: int, ages: Sequence[int | None]) -> list[int]:
        """Fragments in flight whose averages are adopted now: as old as the delay, or about to be contributed again.

        Args:
            steps: steps of the round that have been taken.
            round_steps: length of the round.
            ages: inner steps since each fragment was contributed; None for a fragment that is not in flight.
        """
        due = self.contributed_after(steps, round_steps)
        if self.delay is not None:
            due += [number for number, age in enumerate(ages) if age is not None and age >= self.delay]
        return [number for number, age in enumerate(ages) if age is not None and number in due]

    def next_after(self, steps: int, round_steps: int, ages: Sequence[int | None]) -> int:
        """Number of steps of the round after which the next fragment is contributed or adopted.

        Arguments are those of ``adopted_after``.
        """
        ends = [] if self.delay is None else [steps + self.delay - age for age in ages if age is not None]
        adopted = [max(steps + 1, end) for end in ends]  # of a delay that has become shorter, some are over
        return min(due for due in (*self._due(round_steps), *adopted) if due > steps)

    def _due(self, round_steps: int) -> list[int]:
        return [max(1, round_steps * (number + 1) // self.fragments) for number in range(self.fragments)]


def cut_layouts(layouts: Sequence[FlatLayout], fragments: int) -> list[list[slice]]:
    """Cut buffers into fragments of consecutive parameters, balanced in bytes.

    Statistics belong to the fragment of the last parameter before them.

    Args:
        layouts: layouts of the buffers, each with its parameters first and its statistics behind them.
        fragments: number of fragments.

    Returns:
        For each fragment, a range of the entries of each buffer.

    Raises:
        ConfigurationError: if there are fewer parameters than fragments.
    """
    sizes = [
        entry.size * layout.dtype.itemsize for layout in layouts for entry in layout.entries if entry.group is not None
    ]
    if len(sizes) < fragments:
        raise ConfigurationError(
            f"fragments={fragments}: the model has {len(sizes)} trained parameters, and a fragment needs one at least"
        )
    ends = _balanced_ends(sizes, fragments)
    cut: list[list[slice]] = [[] for _ in ends]
    first = 0
    for layout in layouts:
        trained = sum(entry.group is not None for entry in layout.entries)
        last, start = first + trained, 0
        holder = next((number for number, end in enumerate(ends) if end >= last), fragments - 1)
        for number, end in enumerate(ends):
            stop = min(max(end - first, 0), trained) if number != holder else len(layout.entries)
            cut[number].append(slice(start, max(start, stop)))
            start = max(start, stop)
        first = last
    return cut


def _balanced_ends(sizes: Sequence[int], fragments: int) -> list[int]:
    """Ends of consecutive groups of about equal sums, each of one size at least."""
    totals = [0, *accumulate(sizes)]
    ends: list[int] = []
    for number in range(1, fragments):
        least, most = (ends[-1] if ends else 0) + 1, len(sizes) - (fragments - number)
        goal = totals[-1] * number / fragments
        ends.append(min(range(least, most + 1), key=lambda end: abs(totals[end] - goal)))
    return [*ends, len(sizes)]
