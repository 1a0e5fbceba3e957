"""Collective work in the background that some ranks have begun and others have not, completed when all leave the job.

A rank may begin to average gradients in a backward pass that no step follows, such as one that looks at the gradient of
an input. The other ranks would begin with their next step. After the last step there is none, and MPI cannot end
while messages are in flight that no rank receives.
"""

from dataclasses import dataclass, field
from typing import Protocol
from weakref import WeakValueDictionary

from lentando.comm.job import job_of
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport

__all__ = ["BegunWork", "complete_begun_work", "count_begun_work", "note_work"]


class BegunWork(Protocol):
    """Work of which this rank may have begun a part."""

    @property
    def is_in_flight(self) -> bool:
        """Whether this rank has begun it, and has not waited for its end."""

    def complete(self) -> None:
        """Begin what this rank has not begun, and wait for the end. Collective."""


@dataclass
class _Works:
    """What can be begun on this rank, by numbers that are equal on all ranks."""

    count: int = 0
    by_number: "WeakValueDictionary[int, BegunWork]" = field(default_factory=WeakValueDictionary)

    def in_flight(self) -> list[int]:
        return [number for number, work in sorted(self.by_number.items()) if work.is_in_flight]


def note_work(transport: Transport, work: BegunWork) -> None:
    """Let ``complete_begun_work`` know of work, which may be dropped at any time. Called by all ranks alike.

    Args:
        transport: transport of the job.
        work: the work.
    """
    works = job_of(transport).get(_Works)
    works.by_number[works.count] = work
    works.count += 1


def count_begun_work(transport: Transport) -> int:
    """Return how much work this rank has begun and not ended."""
    works = job_of(transport).find(_Works)
    return 0 if works is None else len(works.in_flight())


def complete_begun_work(transport: Transport) -> None:
    """Complete what any rank has begun, if all ranks still have it. Collective.

    Args:
        transport: transport of the job.
    """
    works = job_of(transport).get(_Works)
    kept = dict(works.by_number)
    by_rank = allgather_object(transport, [works.in_flight(), sorted(kept)])
    begun = {number for numbers, _ in by_rank for number in numbers}
    for number in sorted(begun.intersection(*(known for _, known in by_rank))):
        kept[number].complete()
