"""What a virtual rank does, as a greenlet with a clock, and what it can wait for."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

try:
    from greenlet import greenlet  # type: ignore[import-untyped, unused-ignore]
except ImportError as error:
    raise ImportError("the simulator needs greenlet: pip install lentando[simulation]") from error

__all__ = ["Task", "Wait"]


class Wait(ABC):
    """Something that a rank waits for."""

    __slots__ = ()

    @abstractmethod
    def describe(self) -> str:
        """Return the end of the sentence "rank 3 waits for ...", for the report of a deadlock."""

    @property
    def ends_on_notice(self) -> bool:
        """Whether a notice of another rank ends the wait."""
        return False


@final
class Task:
    """The program of a virtual rank, or what it does in the background: a greenlet with a clock.

    Attributes:
        rank: number of the rank when the simulation began.
        order: place among the tasks that are resumed at the same time; differs between tasks.
        clock: virtual time of the task, in seconds.
        waiting: operation that the rank waits for; None while it can run.
        blocked: whether only ``Scheduler.wake`` resumes the rank.
        ended: end of the task as a verb phrase ("died at 2 s"); None while it lives.
        died: whether the rank ended by a death.
        result: value that the rank's function returned.
    """

    __slots__ = ("blocked", "clock", "died", "ended", "greenlet", "order", "rank", "result", "waiting")

    def __init__(self, rank: int, order: int, run: Callable[[], Any], hub: Any) -> None:
        self.rank = rank
        self.order = order
        self.clock = 0.0
        self.waiting: Wait | None = None
        self.blocked = False
        self.ended: str | None = None
        self.died = False
        self.result: Any = None
        self.greenlet = greenlet(run, hub)
