"""Notices of virtual ranks: small numbers that a rank leaves for another, which may read them while it waits."""

from collections import deque

from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.tasks import Task

__all__ = ["NoticeBoard"]


class NoticeBoard:
    """All notices of a simulation that have not been read. A notice arrives at once.

    Args:
        scheduler: scheduler of the simulation, which resumes ranks that wait for a notice.
    """

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._unread: dict[tuple[int, int], deque[int]] = {}

    def leave(self, task: Task, peer: int, number: int) -> None:
        """Leave ``number`` for rank ``peer``, and resume that rank if a notice ends its wait."""
        self._unread.setdefault((task.rank, peer), deque()).append(number)
        receiver = self._scheduler.tasks[peer]
        if receiver.waiting is not None and receiver.waiting.ends_on_notice:
            self._scheduler.wake(receiver, max(task.clock, receiver.clock))

    def read(self, task: Task, peer: int) -> int | None:
        """Take the next number that rank ``peer`` has left for ``task``; None if there is none."""
        unread = self._unread.get((peer, task.rank))
        return unread.popleft() if unread else None

    def has_unread(self, task: Task) -> bool:
        """Whether any rank has left a number that ``task`` has not read."""
        return any(receiver == task.rank and bool(numbers) for (_, receiver), numbers in self._unread.items())

    def clear(self) -> None:
        """Discard all unread notices."""
        self._unread = {}
