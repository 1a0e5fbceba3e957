"""All-reduce as a reduce-scatter and an all-gather, planned once for a buffer and executed many times.

The two are separate because the outer step runs between them: ``reduce_scatter`` leaves each rank with the sum of its
shard, the rank replaces its shard by the result of the outer rule, and ``all_gather`` distributes all shards.
"""

from typing import get_args

from lentando.comm.dtypes import is_floating
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions.node import open_node_memory
from lentando.comm.reductions.plan import Algorithm, build, default_plan, wants_node_memory
from lentando.comm.reductions.reduction import Reduction
from lentando.comm.reductions.rehearsal import Rehearsal
from lentando.comm.reductions.staged import staged_sums
from lentando.comm.reductions.tuning import tuned_plan
from lentando.comm.transport import Array, Transport

__all__ = ["Algorithm", "all_reduce", "plan_reduction"]


def plan_reduction(
    transport: Transport,
    buffer: Array,
    algorithm: Algorithm = "auto",
    *,
    scatter_gather: bool = False,
    once: bool = False,
) -> Reduction:
    """Plan the all-reduce of ``buffer`` by the algorithm that suits its size.

    Args:
        transport: transport that connects the participating ranks. All of them plan the same number of elements, dtype
            and algorithm.
        buffer: one-dimensional, contiguous array of float32, float64, float16, bfloat16 or integers. It is kept, and
            used in place at each execution.
        algorithm: ``"ring"``; ``"backend"``, the all-reduce of MPI, Horovod or NCCL; or ``"auto"``. On a GPU,
            ``"auto"`` is the backend's all-reduce, or its reduce-scatter and all-gather. Where the buffers of all ranks
            lie in memory that the ranks of their node can access (``FlatBuffer(shared=True)``), and every node has
            equally many ranks, it is ``NodeReduction``, as all ranks find out together. For large buffers,
            ``"auto"`` and ``"ring"`` measure once per job which of several bit-identical plans is the fastest.
            ``"measured"`` compares all algorithms, for smaller buffers as well; the last bits of the sums may then
            differ from one start of the job to the next. The module ``lentando.comm.reductions.tuning`` describes the
            measurement.
        scatter_gather: whether ``reduce_scatter`` and ``all_gather`` will be called instead of ``all_reduce``:
            ``"auto"`` has other thresholds for that.
        once: whether the reduction will be executed a single time: then nothing is measured, and ``"auto"`` plans
            without exchanging messages.

    Raises:
        ConfigurationError: for any other algorithm, dtype or shape.

    Example:
        >>> import numpy as np
        >>> from lentando.comm.testing import run_ranks
        >>> def average(transport):
        ...     buffer = np.arange(3.0) + transport.rank
        ...     reduction = plan_reduction(transport, buffer)  # once
        ...     reduction.all_reduce(mean=True)  # at every step
        ...     return buffer.tolist()
        >>> run_ranks(2, average)
        [[0.5, 1.5, 2.5], [0.5, 1.5, 2.5]]
    """
    if buffer.ndim != 1 or not buffer.flags.c_contiguous:
        raise ConfigurationError(f"a reduction needs a contiguous one-dimensional array, got shape {buffer.shape}")
    if algorithm not in get_args(Algorithm):
        raise ConfigurationError(f"algorithm must be 'auto', 'measured', 'ring' or 'backend', got {algorithm!r}")
    memory = None
    if not once and wants_node_memory(transport, buffer, algorithm):
        memory = open_node_memory(transport, buffer)
    plan = default_plan(transport, buffer, algorithm, scatter_gather=scatter_gather, has_node_memory=memory is not None)
    if not once:
        compare_all = algorithm == "measured"
        rehearsal = Rehearsal(transport, buffer, plan, scatter_gather and compare_all)
        plan = tuned_plan(
            transport, buffer, plan, rehearsal.prepare, scatter_gather=scatter_gather, compare_all=compare_all
        )
    return build(transport, buffer, plan, memory)


def all_reduce(transport: Transport, array: Array, *, mean: bool = False, algorithm: Algorithm = "auto") -> None:
    """Replace ``array`` by its sum or mean over ranks, bit-identical on every rank.

    The array may be in any memory, and another one at each call. On one node, large arrays pass through staging memory
    that the ranks share (``StagedSums``), which is opened at the first call of a job and then kept: 3 MiB on each rank.

    Args:
        transport: transport that connects the participating ranks.
        array: C-contiguous array of any shape, and of the dtypes of ``plan_reduction``; changed in place.
        mean: whether the sum is divided by the number of ranks.
        algorithm: as for ``plan_reduction``; ``"auto"`` includes the staging memory.

    Raises:
        ConfigurationError: for the mean of integers, and wherever ``plan_reduction`` raises it.

    Example:
        >>> import numpy as np
        >>> from lentando.comm.testing import run_ranks
        >>> def total(transport):
        ...     array = np.full((2, 2), transport.rank)
        ...     all_reduce(transport, array)
        ...     return array.tolist()
        >>> run_ranks(3, total)[0]
        [[3, 3], [3, 3]]
    """
    if mean and not is_floating(array.dtype):
        raise ConfigurationError(
            f"the mean of {array.dtype} is not of that dtype: use a sum, or convert to floating point"
        )
    if not array.flags.c_contiguous:
        raise ConfigurationError("all_reduce works in place and needs a C-contiguous array")
    flat = array.reshape(-1)
    staged = staged_sums(transport, flat) if algorithm == "auto" else None
    if staged is not None:
        staged.all_reduce(transport, flat, mean=mean)
    else:
        plan_reduction(transport, flat, algorithm, once=True).all_reduce(mean)
