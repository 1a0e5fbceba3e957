"""How often the calls of ``join()`` in a job have ended by an error on all ranks.

Every rank counts this in the agreement that raises the error. Messages of background threads contain the count, because
they may arrive much later than the error: the count shows which calls of ``join()`` are over.
"""

from dataclasses import dataclass

from lentando.comm.job import job_of
from lentando.comm.transport import Transport

__all__ = ["cancelled_joins", "count_cancelled_joins"]


@dataclass
class _Cancelled:
    count: int = 0


def cancelled_joins(transport: Transport) -> int:
    """How often joins have been cancelled on this transport; equal on all ranks between two agreements."""
    return job_of(transport).get(_Cancelled).count


def count_cancelled_joins(transport: Transport) -> None:
    """Count that an agreement ends all calls of ``join()`` by an error. Every rank of the transport counts it."""
    job_of(transport).get(_Cancelled).count += 1
