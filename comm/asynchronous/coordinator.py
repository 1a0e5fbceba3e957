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


@dataclass(frozen=True)
class _Idle:
    """A rank that submits nothing, because it waits for operations or in a blocking call.

    Attributes:
        waits_for: operations that it waits for; empty in a blocking call.
        call: the blocking call, in words, and a number that no other call of this rank has.
    """

    waits_for: Sequence[str]
    call: Sequence[Any]


class Coordinator:
    """Decides what all ranks execute next.

    Args:
        numbers: numbers of the ranks in the job, for messages.
    """

    def __init__(self, numbers: Sequence[int]) -> None:
        self._numbers = numbers
        self._size = len(numbers)
        self._pending: dict[str, dict[int, str]] = {}
        self._ready: dict[str, None] = {}
        self._joined: list[int] = []
        self._round = self._round_sent = 0
        self._left: set[int] = set()
        self._idle: dict[int, _Idle] = {}
        self._answered: set[int] = set()
        self._question = 0
        self._is_asking = False
        self._received = [Names() for _ in numbers]
        self._sent = Names()

    def receive(self, rank: int, message: Message) -> None:
        """Record a message of a rank.

        Args:
            rank: the sender.
            message: ``submit``: operations as ``Names`` encodes them; ``join``: the rank has called join(), after
                this number of rounds of joins was cancelled; ``round``: that number has changed on this rank;
                ``leave``: the rank leaves; ``idle``: what it waits for, and the last question that it has received.
        """
        if message.get("round", 0) > self._round:
            self._round = message["round"]
            self._joined.clear()
            self._find_ready()
        for sent in message.get("submit", ()):
            key, description = self._received[rank].decode(sent)
            by_rank = self._pending.setdefault(key, {})
            by_rank[rank] = description
            if self._is_complete(by_rank):
                self._ready[key] = None
        if message.get("join") == self._round:
            self._joined.append(rank)
            self._find_ready()
        if "leave" in message:
            self._left.add(rank)
        if "idle" not in message:
            self._idle.pop(rank, None)
            self._is_asking = False
            return
        waits_for, call, question = message["idle"]
        idle = _Idle(waits_for, call)
        if self._idle.get(rank) != idle:
            self._idle[rank] = idle
            self._is_asking = False
        elif self._is_asking and question == self._question:
            self._answered.add(rank)

    def decide(self) -> list[Message]:
        """What all ranks do next.

        Returns:
            messages to all ranks: ``run`` operations, with the ranks that have not submitted each in ``absent``, if any
            has not; raise ``errors``, each with a name, a text, and the ranks that have not submitted it; return from
            join, if all have ``joined``; contribute nothing for joins before a ``round``; report again what they wait
            for, because rank 0 must ``ask``; ``end``.
        """
        run: list[Any] = []
        absent_by_run: list[list[int]] = []
        errors: list[Any] = []
        for key in self._ready:
            by_rank = self._pending.pop(key)
            description, absent = next(iter(by_rank.values())), self._absent(by_rank)
            problem = reports.different(key, by_rank, self._numbers) or reports.joined(
                description, absent, self._numbers
            )
            if problem is None:
                run.append(self._sent.encode((key, description)))
                absent_by_run.append(absent)
            else:
                errors.append([key, problem, absent])
        self._ready.clear()
        decisions: list[Message] = []
        if run:
            decisions.append({"run": run, "absent": absent_by_run} if any(absent_by_run) else {"run": run})
        if len(self._joined) == self._size:
            decisions.append({"joined": self._numbers[self._joined[-1]]})
            self._joined.clear()
        if self._round > self._round_sent:
            self._round_sent = self._round
            decisions.append({"round": self._round})
        if not decisions and not errors and self._may_be_deadlock():
            if not self._is_asking:
                self._is_asking = True
                self._question += 1
                self._answered.clear()
                decisions.append({"ask": self._question})
            elif all(rank in self._answered for rank in self._idle):
                text = reports.deadlock([self._in_words(rank) for rank in range(self._size)], self._numbers)
                errors = [[key, text, self._absent(by_rank)] for key, by_rank in self._pending.items()]
                self._pending.clear()
        if errors:
            decisions.append({"errors": errors})
        if len(self._left) == self._size:
            decisions.append({"end": True})
            self._left.clear()
        return decisions

    def _find_ready(self) -> None:
        """Find the operations that all ranks have submitted, but for those that have joined."""
        complete = [key for key, by_rank in self._pending.items() if self._is_complete(by_rank)]
        found = dict.fromkeys(complete)
        self._ready = {key: None for key in (*self._ready, *complete) if key in found}

    def _is_complete(self, by_rank: dict[int, str]) -> bool:
        return len(by_rank) == self._size or len(by_rank.keys() | set(self._joined)) == self._size

    def _absent(self, by_rank: dict[int, str]) -> list[int]:
        return [] if len(by_rank) == self._size else [rank for rank in range(self._size) if rank not in by_rank]

    def _may_be_deadlock(self) -> bool:
        """Whether all ranks wait, according to their last messages.

        A rank may have continued since. It is asked again: if it then waits for the same, it has done so when the
        question was sent, and so have all others.
        """
        if not self._pending or len(self._idle.keys() | set(self._joined)) < self._size:
            return False
        if not any(idle.waits_for for idle in self._idle.values()):
            return False
        return all(rank in self._pending.get(key, ()) for rank, idle in self._idle.items() for key in idle.waits_for)

    def _in_words(self, rank: int) -> str:
        idle = self._idle.get(rank)
        if idle is None:
            return "has called join()"
        if idle.waits_for:
            return reports.waits_for(idle.waits_for, self._pending, self._numbers)
        return f"waits in {idle.call[0]}"
