"""Ranks plans of a reduction by measuring them, once per job, before the first large buffer is planned.

By default only plans whose results are bit-identical are compared: those that differ in the length of the ring's
segments. A job therefore ends with the same bits whatever a measurement on a busy machine favours, and a resumed job
with the bits of the uninterrupted one, although no checkpoint records the decision. All ranks decide by the same
numbers, the times of the slowest rank. Nothing is built here: the caller passes a function that prepares a plan for
execution.
"""

import logging
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import inf
from typing import TypeAlias

import numpy as np

from lentando.comm.array_module import is_on_host
from lentando.comm.capabilities import VirtualTime, yields_cpu
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import ConfigurationError, grouped_by_rank
from lentando.comm.job import job_of
from lentando.comm.objects import allgather_object
from lentando.comm.reductions.plan import WITHIN_NODE_SEGMENTS, ReductionPlan, plan_for
from lentando.comm.reductions.ring import DEFAULT_SEGMENTS, Segments
from lentando.comm.stall import watched
from lentando.comm.transport import Array, Transport

__all__ = ["Prepare", "TunedPlan", "Tuning", "tuned_plan"]

_log = logging.getLogger("lentando")

SEGMENTS_VARIABLE = "LENTANDO_RING_SEGMENTS"
MEASURED_FROM_BYTES = 4 * 1024 * 1024
"""Smaller buffers keep the default plan: measuring would cost more than it could gain."""
COMPARED_FROM_BYTES = 64 * 1024
"""The same threshold for ``algorithm="measured"``, which asks for a comparison."""
ROUNDS = 5
"""Times that each plan is executed, if there is time. The best time counts: the others include disturbances."""
BUDGET_SECONDS = 0.3
"""No further round begins after this time, except for a second one that must confirm a change."""
CLEARLY_FASTER = 1.05
"""The default plan is replaced if it takes at least this many times as long as another: less may be chance."""
TRIED_SEGMENTS = (DEFAULT_SEGMENTS, WITHIN_NODE_SEGMENTS, Segments(4 * 1024 * 1024))
"""Long segments have less overhead per byte, and fill a link with a large product of bandwidth and latency."""

Prepare: TypeAlias = Callable[[ReductionPlan], Callable[[], object]]
"""Builds what a plan needs, collectively, and returns a function that executes the plan once."""


@dataclass(frozen=True)
class TunedPlan:
    """A decision of a job, with the measurements that led to it.

    Attributes:
        buffers: description of the buffers that it applies to.
        plan: the plan that was chosen.
        seconds: best time of each plan on the slowest rank; the first is the default plan.
    """

    buffers: str
    plan: ReductionPlan
    seconds: Mapping[ReductionPlan, float]

    def __str__(self) -> str:
        times = ", ".join(f"{plan} {1e3 * seconds:.3g} ms" for plan, seconds in self.seconds.items())
        return f"{self.buffers}: {self.plan} (measured: {times})"


@dataclass
class Tuning:
    """The decisions of one job.

    Attributes:
        plans: decisions by description of the buffers and candidates, oldest first.
        has_read_variable: whether ``LENTANDO_RING_SEGMENTS`` has been compared between ranks.
        given_segments: the value of ``LENTANDO_RING_SEGMENTS``; None if it is not set.
    """

    plans: dict[tuple[str, tuple[ReductionPlan, ...]], TunedPlan] = field(default_factory=dict)
    has_read_variable: bool = False
    given_segments: Segments | None = None


def tuned_plan(
    transport: Transport,
    buffer: Array,
    default: ReductionPlan,
    prepare: Prepare,
    *,
    scatter_gather: bool = False,
    compare_all: bool = False,
) -> ReductionPlan:
    """The fastest plan to all-reduce ``buffer``; the default plan if none is clearly faster.

    Collective if anything is measured or looked up, which is the case for large buffers in host memory, but not in
    virtual time, nor where a rank may die meanwhile. On a transport of a background thread nothing is measured.

    Args:
        transport: transport that connects the participating ranks.
        buffer: representative of the buffers to be reduced; not modified.
        default: the plan that is kept if nothing is measured.
        prepare: called with each candidate, in the same order on all ranks, before the measurement starts.
        scatter_gather: whether ``reduce_scatter`` and ``all_gather`` will be called instead of ``all_reduce``.
        compare_all: whether plans that sum in another order are candidates too. The shards remain those of the default.

    Raises:
        ConfigurationError: on every rank, if ``LENTANDO_RING_SEGMENTS`` is malformed or differs between ranks.
    """
    from_bytes = COMPARED_FROM_BYTES if compare_all else MEASURED_FROM_BYTES
    if not _can_measure(transport) or not is_on_host(buffer) or buffer.nbytes < from_bytes:
        return default
    plans = _candidates(transport, buffer, default, scatter_gather, compare_all)
    if len(plans) == 1 or yields_cpu(transport):
        return plans[0]
    buffers = _describe_buffers(buffer, scatter_gather and compare_all)
    tuning, key = job_of(transport).get(Tuning), (buffers, tuple(plans))
    if key not in tuning.plans:
        with watched(transport, f"the measurement of all-reduces of {buffers}"):
            seconds = _measured(transport, [prepare(plan) for plan in plans])
        fastest = plans[_clearly_fastest(seconds)]
        tuning.plans[key] = TunedPlan(buffers, fastest, dict(zip(plans, seconds, strict=True)))
        if transport.rank == 0:
            _log.info("all-reduce of %s", tuning.plans[key])
    return tuning.plans[key].plan


def _describe_buffers(buffer: Array, scatter_gather: bool) -> str:
    """The class of buffers that share a decision: up to the next power of two in bytes, and of one dtype."""
    size_bytes = 1 << (buffer.nbytes - 1).bit_length()
    size = f"{size_bytes >> 20} MiB" if size_bytes >= 1 << 20 else f"{size_bytes >> 10} KiB"
    return f"up to {size} of {buffer.dtype.name}{', as reduce-scatter and all-gather' if scatter_gather else ''}"


def _can_measure(transport: Transport) -> bool:
    """Whether time passes while ranks communicate, and all stay until the end. Horovod waits for its own next cycle."""
    is_real = not isinstance(transport, VirtualTime) and transport.name != "horovod"
    return transport.size > 1 and is_real and not is_elastic(transport)


def _candidates(
    transport: Transport, buffer: Array, default: ReductionPlan, scatter_gather: bool, compare_all: bool
) -> list[ReductionPlan]:
    """The plans to choose from, the default one first."""
    ring = plan_for(transport, "ring")
    rings = [ring]
    if buffer.nbytes >= MEASURED_FROM_BYTES and (compare_all or default.segments is not None):
        given = _given_segments(transport)
        rings += [replace(ring, segments=tried) for tried in TRIED_SEGMENTS if tried != ring.segments]
        rings = rings if given is None else [replace(ring, segments=given)]
    plans = [default] if default.segments is None else [replace(default, segments=plan.segments) for plan in rings]
    # "shared memory" on several nodes has other shards, and the state of an outer step is cut by shards.
    if compare_all and (default.method != "shared memory" or default.segments is None or not scatter_gather):
        plans += [plan for plan in (*rings, ReductionPlan("backend")) if plan not in plans]
    return plans


def _given_segments(transport: Transport) -> Segments | None:
    """The value of ``LENTANDO_RING_SEGMENTS``, None if it is not set. Collective at the first call."""
    tuning = job_of(transport).get(Tuning)
    if not tuning.has_read_variable:
        texts = allgather_object(transport, os.environ.get(SEGMENTS_VARIABLE))
        if len(set(texts)) > 1:
            by_rank = grouped_by_rank(["not set" if text is None else text for text in texts])
            raise ConfigurationError(
                f"{SEGMENTS_VARIABLE} differs between ranks: {by_rank}. Let the launcher pass it to all of them "
                f"(mpirun -x {SEGMENTS_VARIABLE}), or to none"
            )
        tuning.given_segments = None if texts[0] is None else _parsed(texts[0])
        tuning.has_read_variable = True
    return tuning.given_segments


def _parsed(text: str) -> Segments:
    numbers = re.fullmatch(r"([1-9][0-9]*)x([1-9][0-9]*)", text)
    if numbers is None:
        raise ConfigurationError(
            f"{SEGMENTS_VARIABLE}={text!r}: expected the bytes of a segment and the number of them in flight, such as "
            f"{DEFAULT_SEGMENTS.segment_bytes}x{DEFAULT_SEGMENTS.in_flight}"
        )
    return Segments(int(numbers[1]), int(numbers[2]))


def _measured(transport: Transport, executions: Sequence[Callable[[], object]]) -> list[float]:
    """Best time of each execution on the slowest rank, in seconds: the same numbers on every rank."""
    executions[0]()  # the first messages open connections
    best, spent = [inf] * len(executions), 0.0
    for repeats in range(ROUNDS):
        for number, execute in enumerate(executions):
            transport.barrier()
            started = transport.clock()
            execute()
            seconds = np.array([transport.clock() - started])
            transport.allreduce(seconds, "max")
            best[number] = min(best[number], float(seconds[0]))
            spent += float(seconds[0])
        # A plan that wins the first round by a single time must win a second one.
        if spent > BUDGET_SECONDS and (repeats > 0 or _clearly_fastest(best) == 0):
            break
    return best


def _clearly_fastest(seconds: Sequence[float]) -> int:
    """The number of the fastest plan, or 0, that of the default plan."""
    fastest = min(range(len(seconds)), key=seconds.__getitem__)
    return fastest if seconds[0] > CLEARLY_FASTER * seconds[fastest] else 0
