"""Which of several ways to all-reduce is the fastest here: measured when a job needs one for the first time.

Unless it is asked for more, it compares only ways whose results have the same bits, which are those of the ring by the
length of its segments: so the same job ends with the same bits, whatever a measurement says on a busy day, and a
resumed job with those of the uninterrupted one, though no checkpoint tells what was chosen. All ranks decide by the
same numbers, the times of the slowest one.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from math import inf
from typing import Literal, NamedTuple, TypeAlias
from weakref import WeakKeyDictionary

import numpy as np

from lentando.comm.array_module import is_on_host
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError, grouped_by_rank
from lentando.comm.objects import allgather_object
from lentando.comm.reductions.backend import BackendReduction
from lentando.comm.reductions.node import plan_node_reduction
from lentando.comm.reductions.reduction import Reduction, store
from lentando.comm.reductions.ring import SEGMENT_BYTES, SEGMENTS_IN_FLIGHT, RingReduction
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.stall import watched
from lentando.comm.transport import Array, Transport, VirtualTime, yields_cpu

__all__ = ["Choice", "Segments", "Way", "chosen_in", "fastest", "planned", "usual_way"]

_log = logging.getLogger("lentando")

SEGMENTS_VARIABLE = "LENTANDO_RING_SEGMENTS"
MEASURED_FROM_BYTES = 4 * 1024 * 1024
"""Smaller buffers take the usual way: to measure would cost more than there is to win."""
COMPARED_FROM_BYTES = 64 * 1024
"""The same where all ways are compared, since that was asked for."""
REHEARSED_BYTES = 32 * 1024 * 1024
"""What a measurement all-reduces at most."""
ROUNDS = 5
"""Times that each way is tried, if there is time. The best counts: what else there is has disturbed it."""
BUDGET_SECONDS = 0.3
"""No further round begins after this time, except for a second one that must confirm a change."""
CLEARLY_FASTER = 1.05
"""Another than the usual way is chosen if that takes so many times as long: less may be chance."""


class Segments(NamedTuple):
    """How a ring cuts what it sends.

    Attributes:
        segment_bytes: longest message.
        in_flight: most segments that are on their way while an earlier one is being added.
    """

    segment_bytes: int = SEGMENT_BYTES
    in_flight: int = SEGMENTS_IN_FLIGHT


By: TypeAlias = Literal["ring", "shared memory", "engine"]


@dataclass(frozen=True)
class Way:
    """One way to all-reduce.

    Attributes:
        by: ``RingReduction``, ``NodeReduction``, or ``BackendReduction``.
        segments: of the ring, which is also what several nodes' shared memory has between them; None without one.
    """

    by: By
    segments: Segments | None = None

    def __str__(self) -> str:
        if self.segments is None:
            return self.by
        between = ", ring between nodes" if self.by == "shared memory" else ""
        return f"{self.by}{between} in segments of {self.segments.segment_bytes}x{self.segments.in_flight}"


TRIED_SEGMENTS = (Segments(), Segments(1024 * 1024), Segments(4 * 1024 * 1024))
"""Long ones cost less to handle, and fill a link that is fast and long."""


@dataclass(frozen=True)
class Choice:
    """What a job has chosen.

    Attributes:
        what: for which buffers, in words.
        way: which.
        seconds: what each way took at best on the slowest rank; the first is the usual one.
    """

    what: str
    way: Way
    seconds: Mapping[Way, float]

    def __str__(self) -> str:
        times = ", ".join(f"{way} {1e3 * seconds:.3g} ms" for way, seconds in self.seconds.items())
        return f"{self.what}: {self.way} (measured: {times})"


class _Job:
    """What the ranks of one transport have settled."""

    def __init__(self) -> None:
        self.given: list[Segments | None] = []
        self.choices: dict[tuple[str, tuple[Way, ...]], Choice] = {}


_jobs: WeakKeyDictionary[Transport, _Job] = WeakKeyDictionary()


def chosen_in(transport: Transport) -> list[Choice]:
    """What was chosen so far by the ranks of this transport, oldest first."""
    job = _jobs.get(transport)
    return [] if job is None else list(job.choices.values())


def usual_way(transport: Transport, by: By) -> Way:
    """How to all-reduce by this if nothing was measured."""
    if transport.local_size < transport.size:
        return Way(by, None if by == "engine" else TRIED_SEGMENTS[0])
    # Within a node there is no link to keep busy, and to copy is all that it costs to send.
    return Way(by, TRIED_SEGMENTS[1] if by == "ring" else None)


def planned(transport: Transport, buffer: Array, way: Way) -> Reduction:
    """Plan the all-reduce of ``buffer`` in this way.

    Raises:
        ConfigurationError: on every rank, if it is by shared memory, and the buffers of some lie elsewhere.
    """
    if way.by == "engine":
        return BackendReduction(transport, buffer)
    segments = way.segments or Segments()
    if way.by == "ring":
        return RingReduction(transport, buffer, segments.segment_bytes, in_flight=segments.in_flight)
    reduction = plan_node_reduction(transport, buffer, segments.segment_bytes, segments.in_flight)
    if reduction is None:
        raise ConfigurationError(f"some ranks cannot reach the {buffer.nbytes} bytes of another rank of their node")
    return reduction


def fastest(
    transport: Transport, buffer: Array, usual: Way, *, scatter_gather: bool = False, of_all: bool = False
) -> Way:
    """The fastest way to all-reduce ``buffer``; the usual one if none is clearly faster.

    Collective where anything is measured or looked up: for large buffers, but not in virtual time, on a device, or
    where a rank may die meanwhile. Where a thread averages beside the computation, nothing is measured.

    Args:
        transport: ranks that take part.
        buffer: like which many will be reduced. Not touched.
        usual: how, if nothing was measured.
        scatter_gather: see ``plan_reduction``.
        of_all: also of the ways that sum in another order. The ranks' shards are those of the usual way.

    Raises:
        ConfigurationError: on every rank, if ``LENTANDO_RING_SEGMENTS`` is not what it should be on all of them.
    """
    from_bytes = COMPARED_FROM_BYTES if of_all else MEASURED_FROM_BYTES
    if not _can_measure(transport) or not is_on_host(buffer) or buffer.nbytes < from_bytes:
        return usual
    ways = _alternatives(transport, buffer, usual, scatter_gather, of_all)
    if len(ways) == 1 or yields_cpu(transport):
        return ways[0]
    scatter_gather = scatter_gather and of_all  # a ring's best segments are those of both its halves
    longest_bytes = 1 << (buffer.nbytes - 1).bit_length()
    what = f"up to {_in_words(longest_bytes)} of {buffer.dtype.name}{', in halves' if scatter_gather else ''}"
    job, question = _job(transport), (what, tuple(ways))
    if question not in job.choices:
        with watched(transport, f"the choice of a way to all-reduce {what}"):
            seconds = _measured(transport, _rehearsals(transport, buffer, ways, scatter_gather))
        way = ways[_clearly_fastest(seconds)]
        job.choices[question] = Choice(what, way, dict(zip(ways, seconds, strict=True)))
        if transport.rank == 0:
            _log.info("all-reduce of %s", job.choices[question])
    return job.choices[question].way


def _can_measure(transport: Transport) -> bool:
    """Whether time passes while ranks communicate, and all stay until the end. Horovod waits for its own next cycle."""
    is_real = not isinstance(transport, VirtualTime) and transport.name != "horovod"
    return transport.size > 1 and is_real and not is_elastic(transport)


def _alternatives(transport: Transport, buffer: Array, usual: Way, scatter_gather: bool, of_all: bool) -> list[Way]:
    """The ways to choose from, the usual one first."""
    ring = usual_way(transport, "ring")
    rings = [ring]
    if buffer.nbytes >= MEASURED_FROM_BYTES and (of_all or usual.segments is not None):
        given = _given_segments(transport)
        rings += [replace(ring, segments=tried) for tried in TRIED_SEGMENTS if tried != ring.segments]
        rings = rings if given is None else [replace(ring, segments=given)]
    ways = [usual] if usual.segments is None else [replace(usual, segments=way.segments) for way in rings]
    # Shared memory of several nodes cuts shards otherwise, and what an outer step keeps is cut by shards.
    if of_all and (usual.by != "shared memory" or usual.segments is None or not scatter_gather):
        ways += [way for way in (*rings, Way("engine")) if way not in ways]
    return ways


def _given_segments(transport: Transport) -> Segments | None:
    """What the variable says; None if it is not set. Collective when first asked."""
    job = _job(transport)
    if not job.given:
        texts = allgather_object(transport, os.environ.get(SEGMENTS_VARIABLE))
        if len(set(texts)) > 1:
            found = grouped_by_rank(["not set" if text is None else text for text in texts])
            raise ConfigurationError(
                f"{SEGMENTS_VARIABLE} differs between ranks: {found}. Have the launcher hand it to all of them (mpirun "
                f"-x {SEGMENTS_VARIABLE}), or to none"
            )
        job.given.append(None if texts[0] is None else _parsed(texts[0]))
    return job.given[0]


def _parsed(text: str) -> Segments:
    numbers = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if numbers is None:
        raise ConfigurationError(
            f"{SEGMENTS_VARIABLE}={text!r}: expected the bytes of a segment and the number of them in flight, such as "
            f"{SEGMENT_BYTES}x{SEGMENTS_IN_FLIGHT}"
        )
    return Segments(int(numbers[1]), int(numbers[2]))


def _rehearsals(
    transport: Transport, buffer: Array, ways: Sequence[Way], scatter_gather: bool
) -> list[Callable[[], object]]:
    """What all-reduces zeros once in each way, as many as ``buffer`` has if they are not too many, as that will be."""
    elements = min(buffer.size, REHEARSED_BYTES // buffer.itemsize)
    zeros: Array = (shared_zeros if ways[0].by == "shared memory" else np.zeros)(elements, buffer.dtype)
    return [_rehearsal(transport, zeros, planned(transport, zeros, way), scatter_gather) for way in ways]


def _rehearsal(transport: Transport, zeros: Array, reduction: Reduction, scatter_gather: bool) -> Callable[[], object]:
    if not scatter_gather:
        return partial(reduction.all_reduce, mean=False)

    def outer_step() -> None:
        total = reduction.reduce_scatter()
        transport.barrier()  # as the question whether the average is finite
        store(total, zeros[reduction.shard], 1)
        reduction.all_gather()

    return outer_step


def _measured(transport: Transport, ways: Sequence[Callable[[], object]]) -> list[float]:
    """What each way takes at best on the slowest rank: the same numbers on every rank."""
    ways[0]()  # the first messages make connections
    best, spent = [inf] * len(ways), 0.0
    for repeats in range(ROUNDS):
        for number, way in enumerate(ways):
            transport.barrier()
            started = transport.clock()
            way()
            seconds = np.array([transport.clock() - started])
            transport.allreduce(seconds, "max")
            best[number] = min(best[number], float(seconds[0]))
            spent += float(seconds[0])
        # Whoever wins the first round by a single time must win another.
        if spent > BUDGET_SECONDS and (repeats > 0 or _clearly_fastest(best) == 0):
            break
    return best


def _clearly_fastest(seconds: Sequence[float]) -> int:
    """The number of the fastest way, or that of the usual one, 0."""
    fastest_way = min(range(len(seconds)), key=seconds.__getitem__)
    return fastest_way if seconds[0] > CLEARLY_FASTER * seconds[fastest_way] else 0


def _in_words(size_bytes: int) -> str:
    return f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"


def _job(transport: Transport) -> _Job:
    return _jobs.setdefault(transport, _Job())
