"""Plans of reductions: the method that all-reduces a buffer, chosen by rule or by measurement, and built here only."""

from dataclasses import dataclass
from math import inf
from typing import Literal, TypeAlias

from lentando.comm.array_module import is_on_host
from lentando.comm.capabilities import BackendReduceScatter, yields_cpu
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions.backend import BackendReduction, BackendShardedReduction
from lentando.comm.reductions.node import NodeMemory, NodeReduction, open_node_memory
from lentando.comm.reductions.none import NoReduction
from lentando.comm.reductions.reduction import Reduction
from lentando.comm.reductions.ring import DEFAULT_SEGMENTS, RingReduction, Segments
from lentando.comm.transport import Array, Transport

__all__ = [
    "RING_FROM_BYTES",
    "SHARED_FROM_BYTES",
    "SHARED_FROM_BYTES_IF_SLOW",
    "WITHIN_NODE_SEGMENTS",
    "Algorithm",
    "Method",
    "ReductionPlan",
    "build",
    "default_plan",
    "plan_for",
    "wants_node_memory",
]

Algorithm: TypeAlias = Literal["auto", "measured", "ring", "backend"]
"""What users ask for; a ``Method`` follows from it."""
Method: TypeAlias = Literal["none", "ring", "shared memory", "backend", "sharded backend"]
"""``NoReduction``, ``RingReduction``, ``NodeReduction``, ``BackendReduction`` or ``BackendShardedReduction``."""

SHARED_FROM_BYTES = 64 * 1024
"""On one node, "auto" leaves smaller buffers to the backend: two barriers cost about as much as its latency."""
SHARED_FROM_BYTES_IF_SLOW = 512 * 1024
"""The same threshold where each barrier takes longer: with a ring between nodes, or where ranks yield the processor."""
RING_FROM_BYTES: dict[str, float] = {
    "one node": 32 * 1024 * 1024,
    "one node, scatter and gather": 4 * 1024 * 1024,
    "several nodes": 256 * 1024,
    "horovod": inf,
}
"""With "auto", smaller buffers are left to the backend: latency dominates there, and the ring needs 2(n - 1) steps.
Between nodes the ring wins early; as a reduce-scatter and an all-gather, the backend moves 1.5 times as much.
``benchmarks/all_reduce.py`` measures where the curves cross. Over Horovod, messages are collectives too, and a ring
never wins."""

WITHIN_NODE_SEGMENTS = Segments(1024 * 1024)
"""Default of a ring within a node: there is no link to keep busy, and the cost of sending is that of copying."""


@dataclass(frozen=True)
class ReductionPlan:
    """How one buffer is all-reduced.

    Attributes:
        method: the reduction that ``build`` makes.
        segments: how the ring cuts its messages, which is the ring between nodes for "shared memory"; None without one.
    """

    method: Method
    segments: Segments | None = None

    def __str__(self) -> str:
        if self.segments is None:
            return self.method
        between = ", ring between nodes" if self.method == "shared memory" else ""
        return f"{self.method}{between} in segments of {self.segments.segment_bytes}x{self.segments.in_flight}"


def wants_node_memory(transport: Transport, buffer: Array, algorithm: Algorithm) -> bool:
    """Whether "shared memory" is the method of first choice, provided that ``open_node_memory`` succeeds."""
    is_slow = yields_cpu(transport) or transport.local_size < transport.size
    from_bytes = SHARED_FROM_BYTES_IF_SLOW if is_slow else SHARED_FROM_BYTES
    if transport.size == 1 or algorithm not in ("auto", "measured"):
        return False
    return buffer.nbytes >= from_bytes and is_on_host(buffer)


def default_plan(
    transport: Transport,
    buffer: Array,
    algorithm: Algorithm,
    *,
    scatter_gather: bool = False,
    has_node_memory: bool = False,
) -> ReductionPlan:
    """The plan for a buffer if nothing has been measured. Sends nothing.

    Args:
        transport: transport that connects the participating ranks.
        buffer: the one-dimensional array to be reduced.
        algorithm: the algorithm that the user asked for.
        scatter_gather: whether ``reduce_scatter`` and ``all_gather`` will be called instead of ``all_reduce``.
        has_node_memory: whether the ranks of each node can access each other's buffers (``open_node_memory``).
    """
    if transport.size == 1:
        return ReductionPlan("none")
    is_free = algorithm in ("auto", "measured")
    if is_free and not is_on_host(buffer) and isinstance(transport, BackendReduceScatter):
        return ReductionPlan("sharded backend" if scatter_gather else "backend")
    if has_node_memory:
        return plan_for(transport, "shared memory")
    if algorithm == "ring" or (is_free and buffer.nbytes >= _ring_from_bytes(transport, scatter_gather)):
        return plan_for(transport, "ring")
    return plan_for(transport, "backend")


def plan_for(transport: Transport, method: Method) -> ReductionPlan:
    """The plan that uses a method with its default segments."""
    is_one_node = transport.local_size == transport.size
    if method == "ring":
        return ReductionPlan(method, WITHIN_NODE_SEGMENTS if is_one_node else DEFAULT_SEGMENTS)
    has_ring = method == "shared memory" and not is_one_node
    return ReductionPlan(method, DEFAULT_SEGMENTS if has_ring else None)


def build(transport: Transport, buffer: Array, plan: ReductionPlan, memory: NodeMemory | None = None) -> Reduction:
    """Build the reduction of ``buffer`` that a plan describes: the only place where reductions are made.

    Args:
        transport: transport that connects the participating ranks.
        buffer: the one-dimensional, contiguous array to be reduced; used in place at each execution.
        plan: method and segments, equal on all ranks.
        memory: the buffers of this node, for "shared memory"; opened here, which is collective, if None.

    Raises:
        ConfigurationError: on every rank, if the plan is "shared memory" and a rank cannot access the buffer of
            another rank of its node.
    """
    segments = plan.segments or DEFAULT_SEGMENTS
    match plan.method:
        case "none":
            return NoReduction(buffer)
        case "backend":
            return BackendReduction(transport, buffer)
        case "sharded backend":
            return BackendShardedReduction(transport, buffer)
        case "ring":
            return RingReduction(transport, buffer, segments)
        case "shared memory":
            memory = memory or open_node_memory(transport, buffer)
            if memory is None:
                raise ConfigurationError(
                    f"some ranks cannot access the {buffer.nbytes} bytes of another rank of their node"
                )
            return NodeReduction(transport, buffer, memory, segments)


def _ring_from_bytes(transport: Transport, scatter_gather: bool) -> float:
    case = "several nodes"
    if transport.local_size == transport.size:
        case = "one node, scatter and gather" if scatter_gather else "one node"
    return RING_FROM_BYTES[transport.name if transport.name in RING_FROM_BYTES else case]
