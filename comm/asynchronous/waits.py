"""What the threads of a rank wait for, and the reports of it by which rank 0 finds deadlocks."""

import threading

from lentando.comm.asynchronous.coordinator import Message

__all__ = ["Waits"]

STUCK_SECONDS = 0.25
"""A rank whose threads have all waited for this time reports it to rank 0."""


class Waits:
    """The waits of the threads of one rank. Callers hold the lock of its operations, except where stated."""

    def __init__(self) -> None:
        self._waiting: dict[int, str] = {}
        self._users: set[int] = set()
        self._blocked_in: tuple[str, float] | None = None
        self._reported: list[str] | None = None

    @property
    def is_waiting(self) -> bool:
        """Whether a thread waits for an asynchronous operation, or in ``join()``. Needs no lock."""
        return bool(self._waiting)

    @property
    def is_blocked(self) -> bool:
        """Whether a blocking call is yet to be reported to rank 0."""
        return self._blocked_in is not None

    def add_user(self, thread: int) -> None:
        """Note that a thread uses asynchronous operations."""
        self._users.add(thread)

    def begin(self, thread: int, key: str) -> None:
        """Note that a thread begins to wait for an operation."""
        self._waiting[thread] = key
        self._users.add(thread)

    def end(self, thread: int) -> None:
        """Note that a thread no longer waits."""
        del self._waiting[thread]

    def set_blocked_in(self, blocked_in: tuple[str, float] | None) -> bool:
        """Note the blocking call in which this rank waits, and when that began. Returns whether it will be reported."""
        self._blocked_in = None if self._waiting else blocked_in
        return self.is_blocked

    def running_users(self) -> set[int]:
        """Threads that use asynchronous operations, and do not wait for one now."""
        alive = {thread.ident for thread in threading.enumerate()}
        self._users &= alive
        return self._users - self._waiting.keys()

    def forget_report(self) -> None:
        """Report again what has been reported. Called by the thread that reports, with or without the lock."""
        self._reported = None

    def reports(self, waited_seconds: float, question: int, is_joining: bool) -> list[Message]:
        """What must be reported to rank 0 now: a blocking call, and what all threads have been waiting for.

        Args:
            waited_seconds: time since something has happened.
            question: number of rank 0's last question.
            is_joining: whether this rank has called ``join()``.
        """
        messages: list[Message] = []
        blocked_in, self._blocked_in = self._blocked_in, None
        if blocked_in is not None and not self._waiting:
            messages.append({"idle": [[], blocked_in, question]})
            self._reported = None
        if waited_seconds < STUCK_SECONDS:
            return messages
        is_stuck = bool(self._waiting) and not self.running_users()
        keys = sorted(set(self._waiting.values()) - {"join"}) if is_stuck else None
        if keys != self._reported and not (keys == [] and is_joining):
            messages.append({"idle": [keys, [], question]} if keys else {})
            self._reported = keys
        return messages
