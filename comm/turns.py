"""Threads of one rank take turns at what ranks do together, so that the messages of two calls never mix.

Which call of one rank belongs to which of another is decided by what the calls are: operation, shape, dtype and name
travel in the control message. Only if two threads make the *same* call at the same time, nobody can say which is which.
That is an error on every rank: in the later call before any data move, in the earlier one, whose control message has
already been sent, when it ends.
"""

import os
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from lentando.comm.errors import MismatchError
from lentando.comm.job import drop_from_all_jobs, job_of
from lentando.comm.transport import Transport

__all__ = ["SAME_CALLS", "Turns", "same_call_elsewhere", "turn"]

SAME_CALLS = (
    "two threads of one rank make the same call at the same time, so that nobody can say which of them belongs to "
    "which of another rank: communicate from one thread at a time"
)


class _Call:
    """What one thread does together with other ranks, or waits to do.

    Attributes:
        what: equal for calls that ranks cannot tell apart; None until that is known.
        overlapping: what the calls of other threads were that ran, or waited, in the meantime.
        same_in: name of a thread that made the same call in the meantime.
    """

    def __init__(self, what: Hashable) -> None:
        self.thread = threading.get_ident()
        self.thread_name = threading.current_thread().name
        self.what = what
        self.overlapping: dict[Hashable, str] = {}
        self.same_in: str | None = None
        self.depth = 1


class Turns:
    """Of the threads that use one transport."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._calls: list[_Call] = []
        self.current: _Call | None = None

    def enter(self, what: Hashable) -> _Call:
        """Wait for this thread's turn. A call inside another one of the same thread is part of that."""
        current = self.current
        if current is not None and current.thread == threading.get_ident():
            current.depth += 1
            return current
        call = _Call(what)
        with self._changing:
            for other in self._calls:
                _meet(call, other)
            self._calls.append(call)
        try:
            self._lock.acquire()
        except BaseException:
            with self._changing:
                self._calls.remove(call)
            raise
        self.current = call
        return call

    def leave(self, call: _Call) -> bool:
        """End the turn. True if this was the whole call, not a part of it."""
        call.depth -= 1
        if call.depth:
            return False
        self.current = None
        with self._changing:
            self._calls.remove(call)
        self._lock.release()
        return True

    def is_now(self, what: Hashable) -> str | None:
        """The current call turns out to be this. Returns the thread that makes the same in the meantime, or None."""
        call = self.current
        if call is None or call.thread != threading.get_ident():
            return None
        call.what = what
        if len(self._calls) > 1:
            with self._changing:
                for other in self._calls:
                    if other is not call:
                        _meet(call, other)
        found = call.overlapping.get(what)
        if found is not None:
            call.same_in = found
        return found


def _meet(call: _Call, other: _Call) -> None:
    for one, another in ((call, other), (other, call)):
        if another.what is not None:
            one.overlapping[another.what] = another.thread_name
            if one.what == another.what:
                one.same_in = another.thread_name


# A thread that has its turn in the parent does not exist in a forked child.
os.register_at_fork(after_in_child=lambda: drop_from_all_jobs(Turns))


@contextmanager
def turn(transport: Transport, what: Hashable = None) -> Iterator[None]:
    """Inside, no other thread of this rank is in a turn on this transport.

    Args:
        transport: that is used inside.
        what: equal for calls that ranks cannot tell apart, as given to ``same_call_elsewhere``; None if it is not known
            yet.

    Raises:
        MismatchError: at the end, if another thread made the same call in the meantime.
    """
    turns = job_of(transport).get(Turns)
    call = turns.enter(what)
    try:
        yield
    except BaseException:
        turns.leave(call)
        raise
    if turns.leave(call) and call.same_in is not None:
        raise MismatchError(f"{SAME_CALLS}. Rank {transport.rank}: threads {call.thread_name!r} and {call.same_in!r}")


def same_call_elsewhere(transport: Transport, what: Hashable) -> str | None:
    """Says what this thread does in its turn, if it has one.

    Returns:
        the name of another thread that makes the same call at the same time, or None.
    """
    turns = job_of(transport).find(Turns)
    return None if turns is None else turns.is_now(what)
