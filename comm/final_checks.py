"""Checks that a rank makes before it leaves the job, of values that it has not reported in a message yet."""

from collections.abc import Callable
from contextvars import copy_context
from dataclasses import dataclass, field
from weakref import finalize

from lentando.comm.job import job_of
from lentando.comm.transport import Transport

__all__ = ["check_before_leaving", "take_problems"]


@dataclass
class _FinalChecks:
    """The final checks of one rank.

    Attributes:
        pending: checks that have not been made.
        problems: descriptions of the problems that checks have found.
    """

    pending: "list[finalize[..., object]]" = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def check_before_leaving(transport: Transport, owner: object, check: Callable[[], str | None]) -> None:
    """Call a function once: when its owner is dropped, or otherwise when this rank leaves the job.

    Args:
        transport: transport of the job.
        owner: object whose state is checked.
        check: returns a description of the problem, or None. Must not refer to ``owner``, which would then never be
            dropped.
    """
    checks = job_of(transport).get(_FinalChecks)
    checks.pending = [pending for pending in checks.pending if pending.alive]
    problems = checks.problems

    def record() -> None:
        # Garbage collection may call this inside of ``ContextVar.set``. If another variable is set in the same context
        # then, as by ``np.errstate``, Python 3.11 crashes.
        if (problem := copy_context().run(check)) is not None:
            problems.append(problem)

    pending = finalize(owner, record)
    pending.atexit = False
    checks.pending.append(pending)


def take_problems(transport: Transport) -> list[str]:
    """Make all pending checks, and return the descriptions of all problems found. Each problem is returned once."""
    checks = job_of(transport).drop(_FinalChecks)
    if checks is None:
        return []
    for pending in checks.pending:
        pending()
    return checks.problems
