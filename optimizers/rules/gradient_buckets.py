"""AllReduce's buckets: gradients are averaged in parts, each as soon as it is full, during the backward pass.

A backward pass computes the gradients of the last layers first. The flat gradients are therefore cut into buckets from
their end, beginning with a small one, which is full early (as in PyTorch's DistributedDataParallel: Li et al., VLDB
2020, arXiv 2006.15704). All ranks average the buckets in this order, in background threads
(``lentando.comm.background``): while one thread waits for a neighbour, the other uses the link. Buckets have their own
memory: the flat gradients remain those of their rank until all buckets are averaged, so that all gradients can still be
averaged without the buckets.

A framework's adapter fills the buckets during the backward pass. The control message before each average carries every
rank's ``BucketCoverage``, and the least of them decides what the ranks use
(``lentando.optimizers.rules.overlapped_gradients``).
"""

from collections.abc import Sequence
from concurrent.futures import Future
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np

from lentando.comm.array_module import is_on_host
from lentando.comm.background import BackgroundThreads, start_background_threads
from lentando.comm.begun_work import note_work
from lentando.comm.capabilities import shares_memory
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.flat import FlatBuffer
from lentando.comm.reductions.reduction import Reduction
from lentando.comm.transport import Array, Traffic, Transport

__all__ = ["THREADS", "BucketCoverage", "Buckets", "OverlapsGradients", "plan_buckets"]

THREADS = 2
"""Number of threads that average buckets in turn."""
BYTES_PER_RANK = 192 * 1024
"""Bytes of a bucket that each rank sums, where no size is given and the ranks are on several nodes: enough to keep a
link of 1 Gbit/s busy while the next message is awaited, and no more, so that the first bucket is full early
(``benchmarks/run.py iterations``)."""
MOST_BYTES = 25 * 1024 * 1024
"""Size of a bucket, in bytes, where no size is given: at most, and always on one node."""
FIRST_SHARE = 3
"""The first bucket is full with this part of the size of the others. Nothing overlaps with the computation before."""
MOST_FIRST_BYTES = 1024 * 1024
"""Limit of the size of the first bucket."""


class BucketCoverage(IntEnum):
    """Which of a rank's gradients its buckets hold at the end of a step. Of all ranks' coverages, the least counts.

    Attributes:
        ABANDONED: buckets of a step that was not taken are in flight, which other ranks may not have started.
        UNSUPPORTED: a gradient is sparse, which no bucket can hold.
        NONE: the buckets are not to be used: a gradient has changed since its bucket was started.
        ALL_PRESENT: every gradient that this rank has; some parameters have none.
        ALL: a gradient of every parameter.
    """

    ABANDONED = -2
    UNSUPPORTED = -1
    NONE = 0
    ALL_PRESENT = 1
    ALL = 2


class Buckets:
    """The buckets of one model.

    Args:
        threads: threads that average the buckets in turn.
        gradients: flat gradients, each with the presence of every parameter's gradient behind them
            (``gradient_layouts``).
        algorithm: algorithm of the all-reduces.
        bucket_bytes: least size in bytes of every bucket but the first and the last.
        is_automatic: whether the user has not asked for them.

    Attributes:
        coverage: coverage of this rank's gradients of this step; set by the framework's adapter.
        is_automatic: as given. A gradient that they cannot hold is then no error: they are given up.
    """

    def __init__(
        self,
        threads: BackgroundThreads,
        gradients: Sequence[FlatBuffer],
        algorithm: Algorithm,
        bucket_bytes: int,
        is_automatic: bool = False,
    ) -> None:
        self.coverage = BucketCoverage.NONE
        self.is_automatic = is_automatic
        self._threads = threads
        transports = threads.transports
        self._gradients = gradients
        self._memory = [FlatBuffer(flat.layout, shared=shares_memory(transports[0])) for flat in gradients]
        self._buckets: list[_Bucket] = []
        self._by_name: dict[str, _Bucket] = {}
        first_bytes = min(MOST_FIRST_BYTES, bucket_bytes // FIRST_SHARE)
        for flat, buffer in zip(gradients, self._memory, strict=True):
            *trained, presence = buffer.layout.offsets
            stop, names = presence, list[str]()
            for number in reversed(range(len(trained))):
                start = trained[number]
                names.append(buffer.layout.entries[number].name)
                least_bytes = bucket_bytes if self._buckets else first_bytes
                if (stop - start) * buffer.array.itemsize >= least_bytes or number == 0:
                    part = buffer.array[start:stop]
                    reduction = plan_reduction(transports[len(self._buckets) % len(transports)], part, algorithm)
                    bucket = _Bucket(flat.array[start:stop], part, reduction, frozenset(names))
                    self._by_name |= dict.fromkeys(names, bucket)
                    self._buckets.append(bucket)
                    stop, names = start, []
        self._started = 0

    def __len__(self) -> int:
        return len(self._buckets)

    @property
    def is_in_flight(self) -> bool:
        """Whether this rank has started a bucket that has not been waited for."""
        return self._started > 0

    def is_open(self, name: str) -> bool:
        """Whether the flat gradient of this parameter may be written to, because its bucket has not been started."""
        return self._by_name[name].average is None

    def note_final(self, name: str) -> bool:
        """Note that this parameter's gradient is final. Returns whether all of its bucket are."""
        missing = self._by_name[name].missing
        missing.discard(name)
        return not missing

    def withdraw(self, name: str) -> None:
        """Note that this parameter's gradient is not final after all, so that its bucket is not started yet."""
        self._by_name[name].missing.add(name)

    def start_full(self) -> None:
        """Start the buckets that are next in order and whose gradients are final, and in the flat memory by now."""
        while self._started < len(self._buckets) and not self._buckets[self._started].missing:
            self._start_next()

    def start_all(self) -> None:
        """Start the remaining buckets, full or not. Gradients that are missing must be zero by now."""
        while self._started < len(self._buckets):
            self._start_next()

    def wait(self, traffic: Traffic) -> None:
        """Wait until every started bucket is averaged, and open all buckets again.

        Args:
            traffic: counters to which the traffic of the threads is added.
        """
        buckets, self._started = self._buckets[: self._started], 0
        errors = [error for bucket in buckets if bucket.average and (error := bucket.average.exception())]
        for bucket in self._buckets:
            bucket.reset()
        self._threads.count_traffic(traffic)
        if errors:
            raise errors[0]

    def complete(self) -> None:
        """Complete the averages that some ranks have begun, whose results are of no use. Collective."""
        self.start_all()
        self.wait(Traffic())

    def take_over(self) -> None:
        """Replace the flat gradients by the means; the presence of gradients is left as it is."""
        for flat, buffer in zip(self._gradients, self._memory, strict=True):
            stop = flat.layout.offsets[-1]
            flat.array[:stop] = buffer.array[:stop]

    def _start_next(self) -> None:
        bucket = self._buckets[self._started]
        bucket.average = self._threads.submit(self._started % len(self._threads), bucket.form_average)
        self._started += 1


@runtime_checkable
class OverlapsGradients(Protocol):
    """An optional protocol of base algorithms: gradients are averaged during the backward pass."""

    @property
    def buckets(self) -> Buckets | None:
        """Buckets that the framework's adapter fills during the backward pass; None if there are none (any more).

        The adapter starts all of them before each ``average_gradients`` of a replica outside ``join``.
        """

    def finish_buckets(self, agreed: BucketCoverage) -> None:
        """Wait for the buckets in flight.

        Args:
            agreed: least coverage of any rank.
        """


def plan_buckets(
    transport: Transport,
    gradients: Sequence[FlatBuffer],
    algorithm: Algorithm,
    bucket_bytes: int | None,
    is_automatic: bool = False,
) -> Buckets | None:
    """Buckets for these gradients, or None where gradients cannot be averaged in other threads. Collective.

    Args:
        transport: transport that connects the ranks.
        gradients: flat gradients, laid out by ``gradient_layouts``.
        algorithm: algorithm of the all-reduces.
        bucket_bytes: size of a bucket in bytes, None for the default.
        is_automatic: whether the user has not asked for them.
    """
    if transport.size == 1 or not all(is_on_host(buffer.array) for buffer in gradients):
        return None
    threads = start_background_threads(transport, THREADS, "lentando-buckets")
    if threads is None:
        return None
    if bucket_bytes is None:
        is_one_node = transport.local_size == transport.size
        bucket_bytes = MOST_BYTES if is_one_node else min(MOST_BYTES, BYTES_PER_RANK * transport.size)
    buckets = Buckets(threads, gradients, algorithm, bucket_bytes, is_automatic)
    note_work(transport, buckets)
    return buckets


class _Bucket:
    """Parameters whose gradients are contiguous in a flat buffer, and are averaged together.

    Args:
        gradients: their gradients on this rank, within a flat buffer.
        out: memory of equal size, which receives the mean.
        reduction: all-reduce that was planned for ``out``.
        names: names of the parameters.

    Attributes:
        missing: names of the parameters whose gradients are not final yet.
        average: the average in progress, None before it is started.
    """

    def __init__(self, gradients: Array, out: Array, reduction: Reduction, names: frozenset[str]) -> None:
        self._gradients = gradients
        self._out = out
        self._reduction = reduction
        self._names = names
        self.average: Future[None] | None = None
        self.reset()

    def reset(self) -> None:
        self.missing = set(self._names)
        self.average = None

    def form_average(self) -> None:
        np.copyto(self._out, self._gradients)
        self._reduction.all_reduce(mean=True)
