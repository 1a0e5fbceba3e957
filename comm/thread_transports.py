"""Transports for background threads, lent and returned: a job opens as many as are used at once, and reuses them.

Opening and closing a transport are collective, and backends limit the number of open ones (MPICH to some 2000
communicators). But an optimizer is dropped on each rank when Python's garbage collector finds it, in no common order.
Returning a transport therefore sends no message: it is only marked as free, and the next borrower takes transports that
all ranks have marked.
"""

import gc
import time
from dataclasses import dataclass, field

import numpy as np

from lentando.comm.capabilities import Background
from lentando.comm.job import job_of
from lentando.comm.transport import Transport

__all__ = ["Loan", "borrow_transports"]

COLLECTED_FROM = 2
"""With this many transports open and none free, garbage is collected before others are opened: a dropped optimizer may
hold some."""
ENDING_SECONDS = 1.0
"""Time to wait for threads that are about to return their transports."""


class Loan:
    """A transport that is lent to one thread.

    Attributes:
        transport: may be used until ``give_back``.
        is_free: whether it has been returned.
        is_ending: whether it will be returned as soon as the operations that its thread has started are complete.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.is_free = self.is_ending = False

    def give_back(self) -> None:
        """Return the transport, whose messages are complete. Sends nothing; may be called by any thread."""
        self.is_free, self.is_ending = True, False


@dataclass
class _Loans:
    """The transports for threads of one job, in the same order on all ranks."""

    opened: list[Loan] = field(default_factory=list)


def borrow_transports(transport: Transport, count: int) -> list[Loan]:
    """Borrow transports of the same ranks for background threads. Collective.

    Args:
        transport: transport of the job.
        count: number of threads.

    Returns:
        ``count`` loans, or none if the backend admits one thread only.
    """
    if not isinstance(transport, Background):
        return []
    opened = job_of(transport).get(_Loans).opened
    free = _free_on_all_ranks(transport, opened)
    if len(free) < count and len(opened) >= COLLECTED_FROM:
        gc.collect()
        deadline = time.monotonic() + ENDING_SECONDS
        while any(loan.is_ending for loan in opened) and time.monotonic() < deadline:
            time.sleep(0.001)
        free = _free_on_all_ranks(transport, opened)
    loans = free[:count]
    while len(loans) < count:
        for_thread = transport.for_thread()
        if for_thread is None:
            return []
        loans.append(Loan(for_thread))
        opened.append(loans[-1])
    for loan in loans:
        loan.is_free = False
    return loans


def _free_on_all_ranks(transport: Transport, opened: list[Loan]) -> list[Loan]:
    if not opened:
        return []
    is_free_everywhere = transport.allgather(np.array([loan.is_free for loan in opened], np.uint8)).min(axis=0)
    return [loan for loan, is_free in zip(opened, is_free_everywhere, strict=True) if is_free]
