"""All-reduce in two halves, planned once for a buffer and executed many times.

The halves are apart because the outer step lives between them: ``reduce_scatter`` leaves each rank with the sum of its
shard, the rank replaces its shard by whatever it makes of that, and ``all_gather`` hands all shards out.
"""

from math import inf
from typing import Literal, TypeAlias, get_args

from lentando.comm.array_module import is_on_host
from lentando.comm.choice import fastest, planned, usual_way
from lentando.comm.dtypes import is_floating
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions.backend import BackendReduction, BackendShardedReduction
from lentando.comm.reductions.node import NodeReduction, plan_node_reduction
from lentando.comm.reductions.none import NoReduction
from lentando.comm.reductions.reduction import Reduction
from lentando.comm.transport import Array, BackendReduceScatter, Transport, yields_cpu

__all__ = ["Algorithm", "all_reduce", "plan_reduction"]

Algorithm: TypeAlias = Literal["auto", "measured", "ring", "engine"]

SHARED_FROM_BYTES = 64 * 1024
"""On one node, ``auto`` leaves smaller buffers to the engine: two barriers cost about as much as its latency."""
SHARED_FROM_BYTES_IF_SLOW = 512 * 1024
"""The same where there is more to wait for: a ring between nodes, or patience, at each barrier anew."""
RING_FROM_BYTES: dict[str, float] = {
    "one node": 32 * 1024 * 1024,
    "one node, in halves": 4 * 1024 * 1024,
    "several nodes": 256 * 1024,
    "horovod": inf,
}
"""``auto`` leaves smaller buffers to the engine: there, latency decides, and the ring needs 2(n - 1) steps. Between
nodes the ring wins early; in halves, the engine moves everything one and a half times.
``benchmarks/all_reduce.py`` shows where the lines cross. Over Horovod, messages are collectives too: no ring wins."""


def plan_reduction(
    transport: Transport,
    buffer: Array,
    algorithm: Algorithm = "auto",
    *,
    scatter_gather: bool = False,
    once: bool = False,
) -> Reduction:
    """Plan the all-reduce of ``buffer``, one-dimensional and contiguous, by the algorithm that suits its size.

    Args:
        transport: ranks that take part; all must plan the same number of elements, dtype and algorithm.
        buffer: float32, float64, float16, bfloat16 or integers; kept, and used in place at each execution.
        algorithm: ``"ring"``, ``"engine"`` (the transport's own all-reduce), or ``"auto"``. For device arrays that is
            the engine's own, by its halves if it has them.
            Where the buffers of all ranks lie in memory that neighbours can reach (``FlatBuffer(shared=True)``), and
            every node has equally many ranks, it is ``NodeReduction``; whether it can be, ranks find out together.
            For large buffers, ranks measure which of the ways that give the same bits is the fastest, once in a job;
            with ``"ring"``, too. ``"measured"`` compares all ways, for smaller buffers as well: sums then differ in the
            last bits where another start of the job chooses otherwise. See ``lentando.comm.choice``.
        scatter_gather: it will be used by its halves, not as a whole: ``"auto"`` then chooses otherwise.
        once: it will be used a single time: then nothing is measured, and ``"auto"`` plans nothing with other ranks.

    Raises:
        ConfigurationError: for any other algorithm, dtype or shape.
    """
    if buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise ConfigurationError(f"a reduction needs a contiguous one-dimensional array, got shape {buffer.shape}")
    if algorithm not in get_args(Algorithm):
        raise ConfigurationError(f"algorithm must be 'auto', 'measured', 'ring' or 'engine', got {algorithm!r}")
    if transport.size == 1:
        return NoReduction(buffer)
    chooses = algorithm in ("auto", "measured")
    if chooses and not is_on_host(buffer) and isinstance(transport, BackendReduceScatter):
        return BackendShardedReduction(transport, buffer) if scatter_gather else BackendReduction(transport, buffer)
    by_node: NodeReduction | None = None
    if chooses and not once and buffer.nbytes >= _shared_from_bytes(transport) and is_on_host(buffer):
        by_node = plan_node_reduction(transport, buffer)
    is_ring = algorithm == "ring" or (chooses and buffer.nbytes >= _ring_from_bytes(transport, scatter_gather))
    usual = usual_way(transport, "shared memory" if by_node is not None else "ring" if is_ring else "engine")
    way = usual
    if not once:
        way = fastest(transport, buffer, usual, scatter_gather=scatter_gather, of_all=algorithm == "measured")
    return by_node if by_node is not None and way == usual else planned(transport, buffer, way)


def all_reduce(transport: Transport, array: Array, *, mean: bool = False, algorithm: Algorithm = "auto") -> None:
    """Replace ``array`` (any shape, C-contiguous) by its sum or mean over ranks, equal to the bit on every rank.

    Raises:
        ConfigurationError: for the mean of integers, or what ``plan_reduction`` refuses.
    """
    if mean and not is_floating(array.dtype):
        raise ConfigurationError(
            f"the mean of {array.dtype} is not of that dtype: use a sum, or convert to floating point"
        )
    if not array.flags.c_contiguous:
        raise ConfigurationError("all_reduce works in place and needs a C-contiguous array")
    plan_reduction(transport, array.reshape(-1), algorithm, once=True).all_reduce(mean)


def _shared_from_bytes(transport: Transport) -> int:
    is_slow = yields_cpu(transport) or transport.local_size < transport.size
    return SHARED_FROM_BYTES_IF_SLOW if is_slow else SHARED_FROM_BYTES


def _ring_from_bytes(transport: Transport, scatter_gather: bool) -> float:
    place = "several nodes"
    if transport.local_size == transport.size:
        place = "one node, in halves" if scatter_gather else "one node"
    return RING_FROM_BYTES[transport.name if transport.name in RING_FROM_BYTES else place]
