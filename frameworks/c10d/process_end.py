"""What happens to the groups of a process that ends: others learn that, and do not wait for it."""

import atexit
import os
import sys
import time
from typing import Protocol
from weakref import WeakSet

from lentando.c10d.endings import GRACE_SECONDS
from lentando.c10d.futures import wait_for_futures
from lentando.c10d.job import opened_job
from lentando.c10d.waiting import LOOK_SECONDS

__all__ = ["end_with_process", "keep"]

FUTURES_SECONDS = 5.0
"""How long functions that are attached to futures have to end, once the operations are over."""


class _Ends(Protocol):
    def size(self) -> int:
        """Return the number of members of the group."""

    def end(self, what: str) -> None:
        """Let the other members know what this rank has done, and end the thread of the group."""


_open: WeakSet[_Ends] = WeakSet()
_kept: list[_Ends] = []
_pids: list[int] = []


def end_with_process(group: _Ends) -> None:
    """End a group when the process ends. A program that an exception ends also ends the job, after the others know."""
    _open.add(group)
    if not _pids:
        _pids.append(os.getpid())
        atexit.register(_end)  # later than MPI's end was registered, and therefore called before it


def keep(group: _Ends) -> None:
    """Keep a group, with its memory, as long as the process lives."""
    _kept.append(group)


def _end() -> None:
    if os.getpid() not in _pids:
        return
    error = getattr(sys, "last_value", None)
    what = "has ended its program" if error is None else f"has failed ({type(error).__name__}: {error})"
    groups = list(_open)
    for group in groups:
        group.end(what)
    wait_for_futures(FUTURES_SECONDS)
    if error is not None and any(group.size() > 1 for group in groups):  # one alone needs no job of MPI
        time.sleep(LOOK_SECONDS + GRACE_SECONDS + 1.0)  # the others report this, too
        opened_job().transport.abort(1)
