"""The order of asynchronous operations, decided by rank 0 from what all ranks have submitted. Pure bookkeeping.

A rank may submit operations in any order. Each is executed once all ranks have submitted its name, and all ranks
execute them in the order in which rank 0 finds them complete.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from lentando.comm.asynchronous import reports
from lentando.comm.asynchronous.names import Names

__all__ = ["Coordinator", "Message"]

Message = dict[str, Any]

STABLE_SECONDS = 0.25
"""Ranks that have all waited for this time without any progress are in a deadlock: no message is in flight any more."""


@dataclass(frozen=True)
class _Idle:
    """A rank that submits nothing, because it waits for operations or in a blocking call.

    Attributes:
        waits_for: operations that it waits for; empty in a blocking call.
        text: the blocking call, in words.
        since: when this was received.
    """

    waits_for: Sequence[str]
    text: str
    since: float


class Coordinator:
    """Decides what all ranks execute next.

    Args:
        numbers: numbers of the ranks in the job, for messages.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._size = len(numbers)
        self._pending: dict[str, dict[int, str]] = {}
        self._ready: list[str] = []
        self._joined: list[int] = []
        self._left: set[int] = set()
        self._idle: dict[int, _Idle] = {}
        self._received = [Names() for _ in numbers]
        self._sent = Names()

    def receive(self, rank: int, message: Message, now: float) -> None:
        """Record a message of a rank.

        Args:
            rank: the sender.
            message: ``submit``: operations as ``Names`` encodes them; ``join``, ``cancel_join``, ``leave``: the rank
                has called join(), or no longer waits in it, or leaves; ``idle``: what it waits for.
            now: time in seconds.
        """
        for sent in message.get("submit", ()):
            key, description = self._received[rank].decode(sent)
            by_rank = self._pending.setdefault(key, {})
            by_rank[rank] = description
            if self._is_complete(by_rank):
                self._ready.append(key)
        if "join" in message:
            self._joined.append(rank)
            complete = [key for key, by_rank in self._pending.items() if self._is_complete(by_rank)]
            self._ready.extend(key for key in complete if key not in self._ready)
        if "cancel_join" in message:
            self._joined.remove(rank)
        if "leave" in message:
            self._left.add(rank)
        if "idle" in message:
            waits, text = message["idle"]
            self._idle[rank] = _Idle(waits, text, now)
        else:
            self._idle.pop(rank, None)

    def decide(self, now: float) -> list[Message]:
        """What all ranks do next, in this order: ``run`` operations, raise ``errors``, return from join, or ``end``."""
        run: list[Any] = []
        errors: list[list[str]] = []
        for key in self._ready:
            by_rank = self._pending.pop(key)
            description = next(iter(by_rank.values()))
            problem = reports.different(key, by_rank, self._numbers) or reports.joined(
                description, self._joined, self._numbers
            )
            if problem is None:
                run.append(self._sent.encode((key, description)))
            else:
                errors.append([key, problem])
        self._ready.clear()
        decisions: list[Message] = []
        if run:
            decisions.append({"run": run})
        if len(self._joined) == self._size:
            decisions.append({"joined": self._numbers[self._joined[-1]]})
            self._joined.clear()
        if not decisions and not errors and (text := self._deadlock(now)) is not None:
            errors = [[key, text] for key in self._pending]
            self._pending.clear()
        if errors:
            decisions.append({"errors": errors})
        if len(self._left) == self._size:
            decisions.append({"end": True})
            self._left.clear()
        return decisions

    def _is_complete(self, by_rank: dict[int, str]) -> bool:
        return len(by_rank.keys() | set(self._joined)) == self._size

    def _deadlock(self, now: float) -> str | None:
        """The report of a deadlock, None if there is none."""
        if not self._pending or len(self._idle.keys() | set(self._joined)) < self._size:
            return None
        for rank, idle in self._idle.items():  # a rank may have continued since, and report nothing while it computes
            if not all(rank in self._pending.get(key, ()) for key in idle.waits_for):
                return None
        waiting = [idle.since for idle in self._idle.values() if idle.waits_for]
        if not waiting or now - max(waiting) < STABLE_SECONDS:
            return None
        # A blocking call may have returned, unless it was reported again after the last rank has begun to wait.
        if any(not idle.waits_for and idle.since <= max(waiting) for idle in self._idle.values()):
            return None
        return reports.deadlock([self._in_words(rank) for rank in range(self._size)], self._numbers)

    def _in_words(self, rank: int) -> str:
        idle = self._idle.get(rank)
        if idle is None:
            return "has called join()"
        return reports.waits_for(idle.waits_for, self._pending, self._numbers) if idle.waits_for else idle.text
