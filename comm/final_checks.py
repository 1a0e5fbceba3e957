"""What a rank does before it leaves the job: checks of values that it has not reported yet, and waits for its threads.

The owner of what is checked, or of what is waited for, may be dropped before that, by garbage collection, which may run
inside any line of any thread. Checks are made then, because nothing is left of the values later. Nothing is waited for.
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextvars import copy_context
from dataclasses import dataclass, field
from weakref import finalize

from lentando.comm.background import Outcome
from lentando.comm.job import job_of
from lentando.comm.transport import Transport

__all__ = ["check_before_leaving", "take_problems", "wait_before_leaving"]


@dataclass
class _FinalChecks:
    """The final checks of one rank.

    Attributes:
        pending: checks that have not been made, and waits whose owners exist.
        problems: descriptions of the problems that checks have found.
        unfinished: work in the background whose owners have been dropped.
    """

    pending: "list[finalize[..., object]]" = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    unfinished: "deque[Outcome[object]]" = field(default_factory=deque)

    def add(self, owner: object, action: Callable[[], object]) -> None:
        """Call a function once: when its owner is dropped, or when the rank leaves the job."""
        self.pending = [pending for pending in self.pending if pending.alive]
        while self.unfinished and self.unfinished[0].done():
            self.unfinished.popleft()
        self.pending.append(finalize(owner, action))
        self.pending[-1].atexit = False


def check_before_leaving(transport: Transport, owner: object, check: Callable[[], str | None]) -> None:
    """Call a function once: when its owner is dropped, or otherwise when this rank leaves the job.

    Args:
        transport: transport of the job.
        owner: object whose state is checked.
        check: returns a description of the problem, or None. Must not refer to ``owner``, which would then never be
            dropped.
    """
    checks = job_of(transport).get(_FinalChecks)
    problems = checks.problems

    def record() -> None:
        # Garbage collection may call this inside of ``ContextVar.set``. If another variable is set in the same context
        # then, as by ``np.errstate``, Python 3.11 crashes.
        if (problem := copy_context().run(check)) is not None:
            problems.append(problem)

    checks.add(owner, record)


def wait_before_leaving(
    transport: Transport, owner: object, unfinished: Callable[[], Iterable[Outcome[object]]]
) -> None:
    """Wait for work in the background when this rank leaves the job, whose other ranks need its part of it.

    Args:
        transport: transport of the job.
        owner: object for which the work is done. If it is dropped, the work continues: the thread that drops it may be
            the one that does the work, or hold a lock that the work needs.
        unfinished: returns the work that has not been waited for. Must not refer to ``owner``.
    """
    checks = job_of(transport).get(_FinalChecks)
    kept = checks.unfinished
    checks.add(owner, lambda: kept.extend(unfinished()))


def take_problems(transport: Transport) -> list[str]:
    """Make all pending checks, and return the descriptions of all problems found. Each problem is returned once.

    Waits for all work that ``wait_before_leaving`` was given. Its results, and errors, are of no interest any more.
    """
    checks = job_of(transport).drop(_FinalChecks)
    if checks is None:
        return []
    for pending in checks.pending:
        pending()
    for outcome in checks.unfinished:
        outcome.exception()
    return checks.problems
