"""Threads of one rank take turns in collective operations, so that the messages of two calls never mix.

Calls of different ranks are matched by their content: operation, shape, dtype and name are part of the control message.
Only if two threads make the *same* call at the same time, the match is ambiguous. That is an error on every rank: in
the later call before any data move; in the earlier one, whose control message has already been sent, when it ends.
"""

import os
import threading
from collections.abc import Hashable, Iterator
from contextlib import contextmanager

from lentando.comm.errors import MismatchError
from lentando.comm.job import drop_from_all_jobs, job_of
from lentando.comm.transport import Transport

__all__ = ["SAME_CALLS", "Turns", "turn"]

SAME_CALLS = (
    "two threads of one rank make the same call at the same time, so that they cannot be matched with the calls of "
    "another rank: communicate from one thread at a time"
)


class _Call:
    """A collective operation that one thread executes, or waits to execute.

    Attributes:
        content: value that is equal for calls that ranks cannot distinguish; None until it is known.
        overlapping: names of the threads whose calls ran or waited in the meantime, by the content of their calls.
        same_in: name of a thread that made the same call in the meantime.
    """

    def __init__(self, content: Hashable) -> None:
        self.thread = threading.get_ident()
        self.thread_name = threading.current_thread().name
        self.content = content
        self.overlapping: dict[Hashable, str] = {}
        self.same_in: str | None = None
        self.depth = 1


class Turns:
    """The calls of all threads that use one transport.

    Attributes:
        current: the call that has its turn.
        ended: number of calls that have ended.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changing = threading.Lock()
        self._calls: list[_Call] = []
        self.current: _Call | None = None
        self.ended = 0

    def enter(self, content: Hashable) -> _Call:
        """Wait for this thread's turn. A call inside another one of the same thread is a part of that."""
        current = self.current
        if current is not None and current.thread == threading.get_ident():
            current.depth += 1
            return current
        call = _Call(content)
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
        """End the turn. Returns True if this was the whole call, not a part of it."""
        call.depth -= 1
        if call.depth:
            return False
        self.current = None
        self.ended += 1
        with self._changing:
            self._calls.remove(call)
        self._lock.release()
        return True

    def set_content(self, content: Hashable) -> str | None:
        """Set the content of this thread's call, if it has a turn.

        Args:
            content: value that is equal for calls that ranks cannot distinguish.

        Returns:
            The name of another thread that makes the same call at the same time, or None.
        """
        call = self.current
        if call is None or call.thread != threading.get_ident():
            return None
        call.content = content
        if len(self._calls) > 1:
            with self._changing:
                for other in self._calls:
                    if other is not call:
                        _meet(call, other)
        thread = call.overlapping.get(content)
        if thread is not None:
            call.same_in = thread
        return thread


def _meet(call: _Call, other: _Call) -> None:
    """Record in each of two calls that the other one overlaps with it."""
    for first, second in ((call, other), (other, call)):
        if second.content is not None:
            first.overlapping[second.content] = second.thread_name
            if first.content == second.content:
                first.same_in = second.thread_name


# A thread that has its turn in the parent does not exist in a forked child.
os.register_at_fork(after_in_child=lambda: drop_from_all_jobs(Turns))


@contextmanager
def turn(transport: Transport, content: Hashable = None) -> Iterator[None]:
    """Within this context, no other thread of this rank is in a turn on the same transport.

    Args:
        transport: transport that is used within the context.
        content: value that is equal for calls that ranks cannot distinguish, as passed to ``Turns.set_content``; None
            if it is not known yet.

    Raises:
        MismatchError: at the end, if another thread made the same call in the meantime.
    """
    turns = job_of(transport).get(Turns)
    call = turns.enter(content)
    try:
        yield
    except BaseException:
        turns.leave(call)
        raise
    if turns.leave(call) and call.same_in is not None:
        raise MismatchError(f"{SAME_CALLS}. Rank {transport.rank}: threads {call.thread_name!r} and {call.same_in!r}")
