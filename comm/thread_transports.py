"""Transports for threads, lent and given back: a job opens as many as are in use at once, and uses them again.

To open or close one takes all ranks, and engines have only so many (MPICH some 2000 communicators). But an optimizer is
dropped on each rank when Python's garbage collector finds it, in no common order. So giving back is no message, just a
note, and the next who needs transports takes some that all ranks have noted as free.
"""

import gc
import time
from weakref import WeakKeyDictionary

import numpy as np

from lentando.comm.capabilities import Background
from lentando.comm.transport import Transport

__all__ = ["Loan", "borrow_transports", "opened_count"]

COLLECTED_FROM = 2
"""With so many open and none free, it is worth looking for dropped optimizers that hold some before opening others."""


ENDING_SECONDS = 1.0
"""How long to wait for threads that are about to give back."""


class Loan:
    """A transport for one thread.

    Attributes:
        transport: may be used until ``give_back``.
        is_free: whether it has been given back.
        is_ending: whether it will be given back as soon as what its thread has begun is complete.
    """

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.is_free = self.is_ending = False

    def give_back(self) -> None:
        """Let others use the transport, whose messages are complete. Sends nothing; may come from any thread."""
        self.is_free, self.is_ending = True, False


_opened: WeakKeyDictionary[Transport, list[Loan]] = WeakKeyDictionary()
"""By the transport of the job; in the same order on all ranks."""


def borrow_transports(transport: Transport, count: int) -> list[Loan]:
    """Transports of the same ranks for so many threads; none if the engine lets one thread in only. Collective."""
    if not isinstance(transport, Background):
        return []
    opened = _opened.setdefault(transport, [])
    free = _free_everywhere(transport, opened)
    if len(free) < count and len(opened) >= COLLECTED_FROM:
        gc.collect()
        until = time.monotonic() + ENDING_SECONDS
        while any(loan.is_ending for loan in opened) and time.monotonic() < until:
            time.sleep(0.001)
        free = _free_everywhere(transport, opened)
    loans = free[:count]
    while len(loans) < count:
        other = transport.for_thread()
        if other is None:
            return []
        loans.append(Loan(other))
        opened.append(loans[-1])
    for loan in loans:
        loan.is_free = False
    return loans


def opened_count(transport: Transport) -> int:
    """How many transports for threads a job has opened so far."""
    return len(_opened.get(transport, []))


def _free_everywhere(transport: Transport, opened: list[Loan]) -> list[Loan]:
    if not opened:
        return []
    free = transport.allgather(np.array([loan.is_free for loan in opened], np.uint8)).min(axis=0)
    return [loan for loan, is_free in zip(opened, free, strict=True) if is_free]
