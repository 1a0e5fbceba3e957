"""Subsets of the ranks of a job, each with a transport of its own. ``lentando.comm.process_sets`` is the interface.

The subsets belong to the job: they are opened by all of its ranks together, and closed with it. Whatever belongs to a
job on a rank (``lentando.comm.job``) exists for a subset as well, because it is kept by transport.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

from lentando.comm.agreement import Event, Intent, agree, fingerprint
from lentando.comm.asynchronous import close_operations, open_operations
from lentando.comm.capabilities import Subsets
from lentando.comm.checks import is_integer
from lentando.comm.closed import is_closed
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError
from lentando.comm.final_checks import take_problems
from lentando.comm.job import job_of
from lentando.comm.leaving import agree_to_leave
from lentando.comm.numbering import number_as
from lentando.comm.stall import begin_inspection, end_inspection
from lentando.comm.transport import Transport
from lentando.comm.turns import turn

__all__ = [
    "close_subset",
    "close_subsets",
    "leave_subsets",
    "number_of_subset",
    "open_subset",
    "ranks_of_subset",
    "subset_transport",
]


@dataclass
class _Subset:
    """A subset of the ranks.

    Attributes:
        number: the subsets of a job are numbered from 1 in the order in which they are opened; 0 are all ranks.
        transport: transport of the subset; None on a rank that is not a member.
    """

    number: int
    transport: Transport | None


@dataclass
class _Opened:
    """The subsets of one job that are open, by their ranks."""

    by_ranks: dict[tuple[int, ...], _Subset] = field(default_factory=dict)
    count: int = 0


def open_subset(job: Transport, ranks: Sequence[int]) -> None:
    """Open a subset. Collective over all ranks of the job.

    Args:
        job: transport of the job.
        ranks: ranks of the subset, in ascending order.

    Raises:
        ConfigurationError: on every rank, if the ranks do not exist, if they are a subset already, or if this job can
            have no subsets.
        MismatchError: on every rank, if ranks open different subsets.
    """
    described = tuple(ranks)
    problem = _problem_with(job, described)
    _agree(job, "add_process_set", described, problem)
    if problem is not None:
        raise ConfigurationError(problem)
    assert isinstance(job, Subsets)
    opened = job_of(job).get(_Opened)
    with turn(job):
        transport = job.for_ranks(described)
        if transport is not None:
            number_as(transport, described)
            begin_inspection(transport, like=job)
            open_operations(transport)
    opened.count += 1
    opened.by_ranks[described] = _Subset(opened.count, transport)


def number_of_subset(job: Transport, ranks: Sequence[int]) -> int | None:
    """The number of a subset that is open, 0 for all ranks; None if it is not open."""
    if tuple(ranks) == tuple(range(job.size)):
        return 0
    subset = job_of(job).get(_Opened).by_ranks.get(tuple(ranks))
    return None if subset is None else subset.number


def ranks_of_subset(job: Transport, number: int) -> tuple[int, ...] | None:
    """The ranks of the open subset with a number; None if it is not open."""
    opened = job_of(job).get(_Opened).by_ranks
    return next((ranks for ranks, subset in opened.items() if subset.number == number), None)


def subset_transport(job: Transport, ranks: Sequence[int]) -> Transport:
    """The transport of a subset, or of all ranks.

    Raises:
        ConfigurationError: if the subset is not open, or this rank is not a member.
    """
    if tuple(ranks) == tuple(range(job.size)):
        return job
    subset = job_of(job).get(_Opened).by_ranks.get(tuple(ranks))
    if subset is None:
        raise ConfigurationError(
            f"process set {list(ranks)} does not exist in this job: call add_process_set on every rank, or "
            "init(process_sets=[...])"
        )
    if subset.transport is None:
        raise ConfigurationError(
            f"rank {job.rank} is not a member of process set {list(ranks)}, and cannot call its operations: call them "
            "on its members only (process_set.included())"
        )
    return subset.transport


def close_subset(job: Transport, ranks: Sequence[int]) -> None:
    """Close a subset that is open, also if its members find problems. Collective over all ranks of the job.

    Raises:
        MismatchError: on every rank, if ranks close different subsets; on every member, if one of them is about to do
            something else in the subset.
        NonFiniteError: on every member, as ``shutdown`` raises it.
    """
    described = tuple(ranks)
    opened = job_of(job).get(_Opened)
    _agree(job, "remove_process_set", described, None)
    transport = opened.by_ranks.pop(described).transport  # whatever follows: the other ranks have removed it, too
    if transport is None:
        return
    try:
        _leave(transport, take_problems(transport))
    finally:
        _close(transport)


def leave_subsets(job: Transport) -> list[str]:
    """Agree in each subset of this rank that its members leave it together, before the job ends.

    Returns:
        the problems that the final checks of this rank have found in all subsets, to be reported to all ranks.

    Raises:
        MismatchError: on every member of a subset, if one of them is about to do something else.
    """
    problems = []
    for subset in job_of(job).get(_Opened).by_ranks.values():
        if subset.transport is not None and not is_closed(subset.transport):
            problems += take_problems(subset.transport)
            _leave(subset.transport, [])
    return problems


def close_subsets(job: Transport) -> None:
    """Close all subsets, at the end of the job."""
    opened = job_of(job).drop(_Opened)
    for subset in () if opened is None else opened.by_ranks.values():
        if subset.transport is not None:
            _close(subset.transport)


def _leave(transport: Transport, problems: Sequence[str]) -> None:
    with turn(transport):
        agree_to_leave(transport, problems)


def _close(transport: Transport) -> None:
    if not is_closed(transport):
        close_operations(transport)
    end_inspection(transport)
    transport.close()


def _agree(job: Transport, operation: str, ranks: Sequence[int], problem: str | None) -> None:
    call = f"{operation}({list(ranks)})"
    intent = Intent(Event.OPERATION, subject=fingerprint([call, problem]))
    with turn(job, intent):
        agree(job, intent, lambda: f"calls {call}" + (f", which is refused: {problem}" if problem else ""))


def _problem_with(job: Transport, ranks: tuple[int, ...]) -> str | None:
    """The reason why these ranks cannot become a subset, None if they can."""
    if not ranks or not all(is_integer(rank) and 0 <= rank < job.size for rank in ranks):
        return f"process set {list(ranks)}: expected ranks of this job, from 0 to {job.size - 1}, and at least one"
    if len(set(ranks)) < len(ranks):
        return f"process set {list(ranks)}: a rank is in it more than once"
    if number_of_subset(job, ranks) is not None:
        which = "the global process set" if len(ranks) == job.size else "a process set of this job"
        return f"process set {list(ranks)} is {which} already: use that one, or remove it first"
    if is_elastic(job):
        return (
            f"process set {list(ranks)}: an elastic job has no process sets, because they would not survive a death. "
            "Call init() without elastic=True"
        )
    if not isinstance(job, Subsets):
        return (
            f"process set {list(ranks)}: transport {job.name!r} has no process sets. Start the ranks with mpirun, "
            "without LENTANDO_TRANSPORT"
        )
    return None
