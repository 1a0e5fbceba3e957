"""Process sets: operations, and training, among some of the ranks of a job. Names and semantics are Horovod's."""

from collections.abc import Iterable
from typing import Any

from lentando.comm.checks import is_integer
from lentando.comm.errors import ConfigurationError
from lentando.comm.subsets import close_subset, number_of_subset, open_subset, ranks_of_subset, subset_transport
from lentando.comm.transport import Transport
from lentando.comm.world import is_initialized, transport

__all__ = [
    "ProcessSet",
    "add_process_set",
    "global_process_set",
    "process_set_with",
    "remove_process_set",
    "transport_of",
]


class ProcessSet:
    """Some of the ranks of a job, which communicate with each other only.

    Collective operations and optimizers take it as ``process_set=``; only its members call these. It can be used once
    it has been passed, on every rank, to ``init(process_sets=[...])`` or to ``add_process_set``. Sets of the same ranks
    are equal.

    Args:
        ranks: numbers of the ranks, in any order.

    Attributes:
        ranks: the ranks in ascending order; those of the whole job for ``global_process_set``.
        process_set_id: number of the set in its job, 0 for ``global_process_set``; None if it cannot be used.

    Raises:
        ConfigurationError: if ``ranks`` are not integers.

    Example:
        >>> from lentando.comm import operations
        >>> from lentando.comm.testing import run_ranks
        >>> from lentando.comm.world import rank, simulated_rank
        >>> def program(transport):
        ...     with simulated_rank(transport):  # in a program: init()
        ...         even = add_process_set([0, 2])
        ...         if even.included():
        ...             return operations.allreduce_number(rank(), operations.Sum, process_set=even), even.rank()
        >>> run_ranks(3, program)
        [(2, 0), None, (2, 1)]
    """

    def __init__(self, ranks: Iterable[int]) -> None:
        if not isinstance(ranks, Iterable):
            raise ConfigurationError(
                f"a ProcessSet is made from a list of ranks, got a {type(ranks).__name__}: pass the ranks of an MPI "
                "communicator instead of the communicator, or join it alone by init(comm)"
            )
        given = list(ranks)
        if not all(is_integer(rank) for rank in given):
            raise ConfigurationError(f"a ProcessSet is made from a list of ranks, which are integers, got {given!r}")
        self._ranks: tuple[int, ...] = tuple(sorted(int(rank) for rank in given))

    @property
    def ranks(self) -> list[int]:
        """The ranks in ascending order, numbered as in the whole job."""
        return list(self._ranks)

    @property
    def process_set_id(self) -> int | None:
        """Number of the set in its job, 0 for all ranks; None if it has not been added, or has been removed."""
        return number_of_subset(transport(), self.ranks) if is_initialized() else None

    def included(self) -> bool:
        """Whether this rank is a member."""
        return transport().rank in self.ranks

    def rank(self) -> int | None:
        """Number of this rank among the members; None if the set has not been added.

        Operations name ranks by their number in the whole job, also within a process set.

        Raises:
            ConfigurationError: if this rank is not a member.
        """
        return None if self.process_set_id is None else transport_of(self).rank

    def size(self) -> int | None:
        """Number of members; None if the set has not been added."""
        return None if self.process_set_id is None else len(self.ranks)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProcessSet) and self._ranks == other._ranks and type(self) is type(other)

    def __hash__(self) -> int:
        return hash(self._ranks)

    def __repr__(self) -> str:
        return f"ProcessSet(process_set_id={self.process_set_id}, ranks={self.ranks})"


class _GlobalProcessSet(ProcessSet):
    """The set of all ranks of the job, whatever their number."""

    def __init__(self) -> None:
        super().__init__([])

    @property
    def ranks(self) -> list[int]:
        return list(range(transport().size)) if is_initialized() else []


global_process_set = _GlobalProcessSet()
"""The set of all ranks of the job, in which operations run by default. It cannot be removed."""


def add_process_set(process_set: "ProcessSet | Iterable[int]") -> ProcessSet:
    """Add a process set to the job, and return it. Every rank of the job calls it, with the same ranks.

    Args:
        process_set: the set, or its ranks.

    Raises:
        ConfigurationError: on every rank, if the job has this set already, or a rank does not exist, or if the job is
            elastic or runs over a backend without process sets.
        MismatchError: on every rank, if ranks add different sets.
    """
    added = process_set if isinstance(process_set, ProcessSet) else ProcessSet(process_set)
    open_subset(transport(), added.ranks)
    return added


def remove_process_set(process_set: ProcessSet) -> bool:
    """Remove a process set from the job. Every rank of the job calls it, members or not.

    Optimizers over the set can no longer be used.

    Returns:
        False if the set is not part of the job, or is ``global_process_set``; nothing has happened then.

    Raises:
        MismatchError: on every rank, if ranks remove different sets; on every member, if one of them is about to do
            something else. The set has been removed in the latter case.
        NonFiniteError: on every member, as ``shutdown`` raises it. The set has been removed.
    """
    check_process_set(process_set)
    if not process_set.process_set_id:
        return False
    close_subset(transport(), process_set.ranks)
    return True


def transport_of(process_set: ProcessSet) -> Transport:
    """The transport that connects the members of a process set.

    An optimizer over it trains one model on these ranks, apart from all others.

    Raises:
        ConfigurationError: if the set has not been added, or this rank is not a member.
        NotInitializedError: before ``init()`` or after ``shutdown()``.
    """
    check_process_set(process_set)
    job = transport()
    return job if process_set is global_process_set else subset_transport(job, process_set.ranks)


def process_set_with(number: int) -> ProcessSet:
    """The process set of this job with a number (``process_set_id``).

    Raises:
        ConfigurationError: if there is none.
    """
    if number == 0:
        return global_process_set
    ranks = ranks_of_subset(transport(), number)
    if ranks is None:
        raise ConfigurationError(f"this job has no process set with number {number}: add_process_set returns the set")
    return ProcessSet(ranks)


def check_process_set(process_set: Any) -> None:
    """Check the type of an argument.

    Raises:
        ConfigurationError: if it is not a ``ProcessSet``.
    """
    if not isinstance(process_set, ProcessSet):
        raise ConfigurationError(
            f"process_set must be a ProcessSet, as add_process_set returns it, got {process_set!r}"
        )
