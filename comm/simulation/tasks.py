"""A virtual rank as a greenlet with a clock, and what it can wait for."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, final

try:
    from greenlet import greenlet  # type: ignore[import-untyped, unused-ignore]
except ImportError as error:
    raise ImportError("the simulator needs greenlet: pip install lentando[simulation]") from error

__all__ = ["Task", "Wait"]


class Wait(ABC):
    """What a rank waits for, told in words when nobody can go on."""

    @abstractmethod
    def in_words(self) -> str:
        """Completes the sentence "rank 3 waits for ..."."""


@final
class Task:
    """One rank: a greenlet with a clock.

    Attributes:
        rank: number of the rank.
        clock: its virtual time in seconds.
        waiting: what it waits for; None while it could run.
        blocked: whether only ``wake`` lets it go on.
        ended: how it ended, in words; None before.
        died: whether it ended by a death.
        result: what it returned.
    """

    __slots__ = ("blocked", "clock", "died", "ended", "greenlet", "rank", "result", "waiting")

    def __init__(self, rank: int, run: Callable[[], Any]) -> None:
        self.rank = rank
        self.clock = 0.0
        self.waiting: Wait | None = None
        self.blocked = False
        self.ended: str | None = None
        self.died = False
        self.result: Any = None
        self.greenlet = greenlet(run)
