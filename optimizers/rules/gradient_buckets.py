"""Gradients averaged bucket by bucket, each as soon as it is full, while the rest of the backward pass computes.

Backward passes find the gradients of the last layers first. So buckets are cut from the end of the flat gradients, a
small one first, which begins early (as PyTorch's DistributedDataParallel does: Li et al., VLDB 2020, arXiv 2006.15704),
and all ranks average them in this order, by threads with a transport each: while one waits for a neighbour, the link is
the other's. They have memory of their own, too: the flat gradients stay those of their rank until all are averaged, so
that another way is always left.
"""

import threading
from collections.abc import Sequence
from enum import IntEnum
from queue import SimpleQueue
from weakref import finalize

import numpy as np

from lentando.comm.capabilities import shares_memory
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.flat import FlatBuffer
from lentando.comm.reductions.reduction import Reduction
from lentando.comm.thread_transports import Loan
from lentando.comm.transport import Array, Traffic

__all__ = ["THREADS", "BucketCoverage", "Buckets"]

THREADS = 2
"""That average buckets in turn."""
FIRST_BYTES = 1024 * 1024
"""Of the first bucket, which nothing can hide behind until it is full."""


class BucketCoverage(IntEnum):
    """Which of a rank's gradients its buckets hold at the end of a step. Of all ranks' coverages, the least counts.

    Attributes:
        NONE: the buckets are not to be used: a gradient has changed since its bucket was started.
        ALL_PRESENT: every gradient that this rank has; some parameters have none.
        ALL: a gradient of every parameter.
    """

    NONE = 0
    ALL_PRESENT = 1
    ALL = 2


class Buckets:
    """The buckets of one model.

    Args:
        loans: of transports of the same ranks, each for a thread of its own; given back when this is garbage and its
            threads have ended.
        gradients: of parameters, and behind them, which there are (``gradient_layouts``).
        algorithm: how each is averaged.
        bucket_bytes: of each but the first and the last.
    """

    def __init__(
        self, loans: Sequence[Loan], gradients: Sequence[FlatBuffer], algorithm: Algorithm, bucket_bytes: int
    ) -> None:
        self._loans = loans
        self._transports = transports = [loan.transport for loan in loans]
        self._gradients = gradients
        self._memory = [FlatBuffer(own.layout, shared=shares_memory(transports[0])) for own in gradients]
        self._buckets: list[_Bucket] = []
        self._of: dict[str, _Bucket] = {}
        for own, buffer in zip(gradients, self._memory, strict=True):
            *trained, presence = buffer.layout.offsets
            stop, names = presence, list[str]()
            for number in reversed(range(len(trained))):
                start = trained[number]
                names.append(buffer.layout.entries[number].name)
                wanted = bucket_bytes if self._buckets else min(FIRST_BYTES, bucket_bytes)
                if (stop - start) * buffer.array.itemsize >= wanted or number == 0:
                    part = buffer.array[start:stop]
                    reduction = plan_reduction(transports[len(self._buckets) % len(transports)], part, algorithm)
                    bucket = _Bucket(own.array[start:stop], part, reduction, frozenset(names))
                    self._of |= dict.fromkeys(names, bucket)
                    self._buckets.append(bucket)
                    stop, names = start, []
        self._started = 0
        self._threads: list[_Thread] = []
        finalize(self, _end, loans, self._threads)

    def __len__(self) -> int:
        return len(self._buckets)

    @property
    def is_in_flight(self) -> bool:
        """Whether this rank has started any that is not waited for."""
        return self._started > 0

    def is_open(self, name: str) -> bool:
        """Whether the flat gradient of this parameter may be written to: its bucket has not started."""
        return not self._of[name].started

    def filled(self, name: str) -> None:
        """The flat gradient of this parameter is there. Starts what is full now, and next in order."""
        self._of[name].missing.discard(name)
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            self._start_next()

    def start_all(self) -> None:
        """Start the rest, full or not. What is not there must be zero by now."""
        while self._started < len(self._buckets):
            self._start_next()

    def wait(self, traffic: Traffic) -> None:
        """Return when all that has started is averaged, and counted in ``traffic``. Buckets may be filled again."""
        buckets, self._started = self._buckets[: self._started], 0
        for bucket in buckets:
            bucket.done.wait()
        errors = [bucket.error for bucket in buckets if bucket.error is not None]
        for bucket in self._buckets:
            bucket.reset()
        for transport in self._transports:
            traffic.take_over(transport.traffic)
        if errors:
            raise errors[0]

    def take_over(self) -> None:
        """The flat gradients become the means; which there are stays as it is."""
        for own, buffer in zip(self._gradients, self._memory, strict=True):
            stop = own.layout.offsets[-1]
            own.array[:stop] = buffer.array[:stop]

    def _start_next(self) -> None:
        if not self._threads:
            self._threads.extend(_Thread(loan) for loan in self._loans)
        bucket = self._buckets[self._started]
        bucket.started = True
        self._threads[self._started % len(self._threads)].queue.put(bucket)
        self._started += 1


class _Bucket:
    """Some parameters whose gradients lie side by side."""

    def __init__(self, gradients: Array, out: Array, reduction: Reduction, names: frozenset[str]) -> None:
        self._gradients = gradients
        self._out = out
        self._reduction = reduction
        self._names = names
        self.done = threading.Event()
        self.reset()

    def reset(self) -> None:
        self.missing = set(self._names)
        self.started = False
        self.error: Exception | None = None
        self.done.clear()

    def average(self) -> None:
        try:
            np.copyto(self._out, self._gradients)
            self._reduction.all_reduce(mean=True)
        except Exception as error:  # noqa: BLE001 - it is raised again, in the thread that waits
            self.error = error
        self.done.set()


class _Thread:
    """Averages buckets in the order in which they are put into its queue; None ends it and gives its transport back."""

    def __init__(self, loan: Loan) -> None:
        self.queue: SimpleQueue[_Bucket | None] = SimpleQueue()
        threading.Thread(target=_run, args=(self.queue, loan), name="lentando-buckets", daemon=True).start()


def _run(queue: "SimpleQueue[_Bucket | None]", loan: Loan) -> None:
    while (bucket := queue.get()) is not None:
        bucket.average()
    loan.give_back()


def _end(loans: Sequence[Loan], threads: Sequence[_Thread]) -> None:
    """The buckets are garbage: what was started is averaged to its end, for the other ranks wait for it."""
    if threads:
        for loan in loans:
            loan.is_ending = True
        for thread in threads:
            thread.queue.put(None)
    else:
        for loan in loans:
            loan.give_back()
