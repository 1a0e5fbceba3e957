"""AllReduce's buckets: gradients are averaged in parts, each as soon as it is full, during the backward pass.

A backward pass computes the gradients of the last layers first. The flat gradients are therefore cut into buckets from
their end, beginning with a small one, which is full early (as in PyTorch's DistributedDataParallel: Li et al., VLDB
2020, arXiv 2006.15704). All ranks average the buckets in this order, in background threads
(``lentando.comm.background``): while one thread waits for a neighbour, the other uses the link. Buckets have their own
memory: the flat gradients remain those of their rank until all buckets are averaged, so that all gradients can still be
averaged without the buckets.

A framework's adapter fills the buckets during the backward pass. The control message before each average carries every
rank's ``BucketCoverage``, and the least of them decides what the ranks use.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from enum import IntEnum
from typing import Protocol, runtime_checkable

import numpy as np

from lentando.comm.agreement import Event
from lentando.comm.array_module import is_on_host
from lentando.comm.background import BackgroundThreads, start_background_threads
from lentando.comm.capabilities import shares_memory
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.flat import FlatBuffer
from lentando.comm.reductions.reduction import Reduction
from lentando.comm.transport import Array, Traffic, Transport
from lentando.optimizers.rules.base_algorithm import BoundAlgorithm
from lentando.optimizers.rules.partial_average import PartialAverage

__all__ = ["THREADS", "BucketCoverage", "Buckets", "OverlappedGradients", "OverlapsGradients", "plan_buckets"]

THREADS = 2
"""Number of threads that average buckets in turn."""
FIRST_BYTES = 1024 * 1024
"""Size of the first bucket, in bytes. Nothing overlaps with the computation before it is full."""


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
        threads: threads that average the buckets in turn.
        gradients: flat gradients, each with the presence of every parameter's gradient behind them
            (``gradient_layouts``).
        algorithm: algorithm of the all-reduces.
        bucket_bytes: size in bytes of every bucket but the first and the last.

    Attributes:
        coverage: coverage of this rank's gradients of this step; set by the framework's adapter.
    """

    def __init__(
        self, threads: BackgroundThreads, gradients: Sequence[FlatBuffer], algorithm: Algorithm, bucket_bytes: int
    ) -> None:
        self.coverage = BucketCoverage.NONE
        self._threads = threads
        transports = threads.transports
        self._gradients = gradients
        self._memory = [FlatBuffer(flat.layout, shared=shares_memory(transports[0])) for flat in gradients]
        self._buckets: list[_Bucket] = []
        self._by_name: dict[str, _Bucket] = {}
        for flat, buffer in zip(gradients, self._memory, strict=True):
            *trained, presence = buffer.layout.offsets
            stop, names = presence, list[str]()
            for number in reversed(range(len(trained))):
                start = trained[number]
                names.append(buffer.layout.entries[number].name)
                least_bytes = bucket_bytes if self._buckets else min(FIRST_BYTES, bucket_bytes)
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

    def filled(self, name: str) -> None:
        """Note that this parameter's flat gradient is final. Starts the buckets that are full and next in order."""
        self._by_name[name].missing.discard(name)
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
        """Buckets that the framework's adapter fills during the backward pass; None if there are none.

        The adapter starts all of them before each ``average_gradients`` of a replica outside ``join``.
        """

    def finish_buckets(self, agreed: BucketCoverage) -> None:
        """Wait for the buckets in flight.

        Args:
            agreed: least coverage of any rank.
        """


class OverlappedGradients(BoundAlgorithm, OverlapsGradients):
    """Uses the means that the buckets hold, where they hold them on all ranks.

    Args:
        transport: transport that connects the ranks.
        gradients: flat gradients, laid out by ``gradient_layouts``.
        buckets: buckets of these gradients.
        whole: averages all gradients where the buckets cannot be used.
    """

    def __init__(
        self, transport: Transport, gradients: Sequence[FlatBuffer], buckets: Buckets, whole: BoundAlgorithm
    ) -> None:
        self._buckets = buckets
        self._whole = whole
        self._traffic = transport.traffic
        self._presence = [
            plan_reduction(transport, flat.array[flat.layout.offsets[-1] :], "backend") for flat in gradients
        ]
        self._agreed = BucketCoverage.NONE

    @property
    def buckets(self) -> Buckets:
        return self._buckets

    def contribute(self, event: Event) -> Mapping[str, float]:
        """Attach which of this rank's gradients of this step the buckets hold."""
        return {"coverage": self.buckets.coverage}

    def receive(self, event: Event, by_rank: Mapping[str, Array]) -> None:
        """Finish the buckets before an average of gradients, for which the least coverage of any rank counts."""
        if event is Event.GRADIENTS:
            self.finish_buckets(BucketCoverage(int(by_rank["coverage"].min())))

    def finish_buckets(self, agreed: BucketCoverage) -> None:
        self._agreed, self.buckets.coverage = agreed, BucketCoverage.NONE
        if self.buckets.is_in_flight:
            self.buckets.wait(self._traffic)

    def average_gradients(self, partial_average: PartialAverage | None = None) -> None:
        agreed, self._agreed = self._agreed, BucketCoverage.NONE
        if partial_average is not None or agreed is BucketCoverage.NONE:
            self._whole.average_gradients(partial_average)
            return
        self.buckets.take_over()
        if agreed is BucketCoverage.ALL_PRESENT:
            for reduction in self._presence:
                reduction.all_reduce(mean=True)


def plan_buckets(
    transport: Transport, gradients: Sequence[FlatBuffer], algorithm: Algorithm, bucket_bytes: int
) -> Buckets | None:
    """Buckets for these gradients, or None where gradients cannot be averaged in other threads. Collective.

    Args:
        transport: transport that connects the ranks.
        gradients: flat gradients, laid out by ``gradient_layouts``.
        algorithm: algorithm of the all-reduces.
        bucket_bytes: size of a bucket in bytes.
    """
    if transport.size == 1 or not all(is_on_host(buffer.array) for buffer in gradients):
        return None
    threads = start_background_threads(transport, THREADS, "lentando-buckets")
    return Buckets(threads, gradients, algorithm, bucket_bytes) if threads else None


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
