"""The numbers that the ranks of a subset have in the whole job, by which messages name them."""

from collections.abc import Sequence
from dataclasses import dataclass

from lentando.comm.errors import ranks_in_words
from lentando.comm.job import job_of
from lentando.comm.transport import Transport

__all__ = ["all_in_words", "in_words", "number_as", "number_of", "numbers_of", "subset_in_words"]


@dataclass(frozen=True)
class _Numbers:
    """The ranks of a subset in the numbering of the job, by their rank in the subset."""

    ranks: tuple[int, ...]


def number_as(transport: Transport, ranks: Sequence[int]) -> None:
    """Record that the ranks of this transport are a subset of a job's.

    Args:
        transport: transport of the subset.
        ranks: numbers of its ranks in the job.
    """
    job_of(transport).put(_Numbers(tuple(ranks)))


def numbers_of(transport: Transport) -> Sequence[int]:
    """The numbers of the ranks of this transport in the job: 0, 1, 2 and so on unless it is that of a subset."""
    numbers = job_of(transport).find(_Numbers)
    return range(transport.size) if numbers is None else numbers.ranks


def number_of(transport: Transport) -> int:
    """The number of this rank in the job."""
    return numbers_of(transport)[transport.rank]


def in_words(transport: Transport, ranks: Sequence[int]) -> str:
    """Name ranks of this transport in a message, by their numbers in the job."""
    numbers = numbers_of(transport)
    return ranks_in_words([numbers[rank] for rank in ranks])


def all_in_words(transport: Transport) -> str:
    """How many ranks the job has, or which process set this transport connects, to end "rank 3 of ..."."""
    return subset_in_words(transport).removeprefix(" of ") or str(transport.size)


def subset_in_words(transport: Transport) -> str:
    """Name the process set of this transport at the end of a phrase in a message; empty for all ranks of the job.

    Example:
        >>> from lentando.comm.transports.single import SingleTransport
        >>> transport = SingleTransport()
        >>> subset_in_words(transport)
        ''
        >>> number_as(transport, [2])
        >>> subset_in_words(transport)
        ' of process set [2]'
    """
    numbers = job_of(transport).find(_Numbers)
    return "" if numbers is None else f" of process set {list(numbers.ranks)}"
