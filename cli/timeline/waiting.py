"""Who waited for whom: the same communication, compared between the traces of all ranks.

The data of an average move once the last rank has reached it. The ranks that came earlier waited for that rank until
then, and what follows is the communication itself. The time between two communications was spent computing. With
gossip, a rank waits for its neighbours alone, and the time that it waits for the last rank is limited to its own part.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from statistics import median

from lentando.cli.timeline.traces import Span, Trace

__all__ = ["Meeting", "RankTimes", "Verdict", "judge", "meetings", "times_of"]

SLOWER = 1.2
"""Ratio to the median of the others from which a rank counts as slower."""
SLOW_LINK = 2.0
"""Ratio to the faster links from which a link counts as slow."""
WORTH_NAMING = 0.05
"""Share of the time of a job from which waiting is worth a sentence."""


@dataclass(frozen=True)
class Meeting:
    """A communication that all ranks took part in.

    Attributes:
        spans: the span of each rank.
    """

    spans: list[Span]

    @cached_property
    def last(self) -> int:
        """Number of the rank that reached it last."""
        return max(range(len(self.spans)), key=lambda rank: self.spans[rank].began)

    @property
    def complete_us(self) -> float:
        """Time in microseconds at which the last rank reached it."""
        return self.spans[self.last].began

    def waited_us(self, rank: int) -> float:
        """Time in microseconds that a rank waited for the last one."""
        span = self.spans[rank]
        return max(0.0, min(self.complete_us, span.ended) - span.began)


@dataclass
class RankTimes:
    """How one rank spent its time, in microseconds.

    Attributes:
        computing: time outside of all communications.
        waiting: time in communications that other ranks had not reached yet.
        communicating: the rest of the time in communications.
        awaited: time that the other ranks, taken together, waited for this rank.
        last: number of communications that this rank reached last.
    """

    computing: float = 0.0
    waiting: float = 0.0
    communicating: float = 0.0
    awaited: float = 0.0
    last: int = 0

    @property
    def total(self) -> float:
        """All of the time, in microseconds."""
        return self.computing + self.waiting + self.communicating


@dataclass(frozen=True)
class Verdict:
    """What limits a job.

    Attributes:
        sentence: the finding, for people.
        rank: number of the rank that the others wait for; None if no rank stands out.
        cause: ``compute`` or ``network``; None if nothing stands out.
    """

    sentence: str
    rank: int | None = None
    cause: str | None = None


def meetings(traces: Sequence[Trace]) -> list[Meeting]:
    """Match the communications of all ranks, in the order of rank 0's.

    Args:
        traces: traces of all ranks. Communications that not all of them contain are left out.
    """
    by_rank = []
    for trace in traces:
        seen: Counter[tuple[str, str]] = Counter()
        found: dict[tuple[str, str, int], Span] = {}
        for span in trace.spans:
            key = (span.name, span.subject)
            found[(*key, seen[key])] = span
            seen[key] += 1
        by_rank.append(found)
    common = [key for key in by_rank[0] if all(key in found for found in by_rank[1:])]
    return [Meeting([found[key] for found in by_rank]) for key in common]


def times_of(traces: Sequence[Trace], met: Sequence[Meeting]) -> list[RankTimes]:
    """Divide the time of each rank, from the end of its first communication to the end of its last.

    The first communication, which sets up what later ones use, is left out.

    Args:
        traces: traces of all ranks.
        met: their common communications, as ``meetings`` returns them.
    """
    times = [RankTimes() for _ in traces]
    for meeting in met[1:]:
        for rank, span in enumerate(meeting.spans):
            waited = meeting.waited_us(rank)
            times[rank].waiting += waited
            times[rank].communicating += span.ended - span.began - waited
            times[meeting.last].awaited += waited
        times[meeting.last].last += 1
    for rank, own in enumerate(times):
        if met:
            own.computing = max(
                0.0, met[-1].spans[rank].ended - met[0].spans[rank].ended - own.waiting - own.communicating
            )
    return times


def judge(times: Sequence[RankTimes], links_us: Sequence[float | None] = ()) -> Verdict:
    """Say which rank the others wait for, and why.

    Args:
        times: times of all ranks.
        links_us: time in microseconds of a message from the previous rank to each rank; None where it is not known.
    """
    total = max((own.total for own in times), default=0.0)
    if len(times) == 1:
        return Verdict("There is nothing to compare: the job has one rank.")
    if total == 0.0:
        return Verdict("There is nothing to compare: the traces contain fewer than two common communications.")
    slowest = max(range(len(times)), key=lambda rank: times[rank].awaited)
    waiting = sum(own.waiting for own in times) / len(times)
    computing = _ratio([own.computing for own in times], slowest)
    if waiting >= WORTH_NAMING * total and computing >= SLOWER:
        return Verdict(
            f"The ranks wait for rank {slowest}, which computes {computing:.1f} times as long as the median of the "
            f"others. Give it less work, or find out what else runs there.",
            slowest,
            "compute",
        )
    busiest = max(range(len(times)), key=lambda rank: times[rank].communicating)
    share = times[busiest].communicating / total
    if share >= WORTH_NAMING:
        return _slow_link(links_us) or _slow_network(share, busiest, [own.communicating for own in times])
    if waiting >= WORTH_NAMING * total:
        return Verdict(
            f"No rank stands out, and each waits for the last one for {waiting / total:.0%} of the time: the times of "
            "single steps vary. A longer period evens them out."
        )
    return Verdict("Nothing stands out: waiting and communication take less than 5 % of the time.")


def _slow_link(links_us: Sequence[float | None]) -> Verdict | None:
    """The link that messages between neighbours, at the beginning of the recording, show to be slow.

    A message crosses the links of two ranks. The rank that both of the slowest messages have in common is named.
    """
    known = [(time, rank) for rank, time in enumerate(links_us) if time is not None]
    if len(known) < 3:
        return None
    usual = median(sorted(time for time, _ in known)[: -(-len(known) // 2)])  # of the faster half
    slow = {rank for time, rank in known if time >= SLOW_LINK * usual}
    if not slow or len(slow) > 2:
        return None
    size = len(links_us)
    in_both_directions = [rank for rank in slow if (rank + 1) % size in slow]
    rank = in_both_directions[0] if in_both_directions else min(slow)
    name = f"of rank {rank}" if in_both_directions else f"from rank {(rank - 1) % size} to rank {rank}"
    worst = max(time for time, _ in known)
    return Verdict(
        f"The link {name} is slow: a message of a megabyte takes {worst / 1e3:.1f} ms over it, and "
        f"{usual / 1e3:.1f} ms over the others. All ranks wait for it.",
        rank,
        "network",
    )


def _slow_network(share: float, busiest: int, communicating: Sequence[float]) -> Verdict:
    ratio = _ratio(communicating, busiest)
    if ratio >= SLOWER:
        return Verdict(
            f"Communication takes {ratio:.1f} times as long on rank {busiest} as on the median of the others, which "
            f"compute equally fast: examine its link (lentando doctor, lentando measure).",
            busiest,
            "network",
        )
    return Verdict(
        f"No rank stands out. Communication takes {share:.0%} of the time on every rank: a longer period or a faster "
        f"network would reduce it (lentando plan).",
        None,
        "network",
    )


def _ratio(values: Sequence[float], rank: int) -> float:
    others = median(value for other, value in enumerate(values) if other != rank)
    return values[rank] / others if others else 1.0
