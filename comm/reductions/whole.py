"""All-reduce into scratch memory that leaves the buffer unchanged, for elastic jobs."""

from lentando.comm.array_module import array_module, is_on_host
from lentando.comm.capabilities import shares_memory
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.reductions.reduction import Each, store, visit
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport

__all__ = ["WholeReduction"]


class WholeReduction:
    """A reduction whose ``reduce_scatter`` all-reduces a copy of the buffer, and whose ``all_gather`` does nothing.

    If a rank dies meanwhile, the buffer is unchanged. This costs one more copy of the buffer, in float32 at least.

    Args:
        transport: transport that connects the participating ranks.
        buffer: one-dimensional, contiguous array.
        algorithm: as for ``plan_reduction``. The sum is formed in the order of its reduce-scatter and all-gather.
    """

    def __init__(self, transport: Transport, buffer: Array, algorithm: Algorithm = "auto") -> None:
        self._transport = transport
        self._buffer = buffer
        self._algorithm = algorithm
        self.shard = slice(0, buffer.size)
        self._module = array_module(buffer)
        dtype = accumulator_dtype(buffer.dtype)
        shared = is_on_host(buffer) and shares_memory(transport)
        self._sum: Array = (shared_zeros if shared else self._module.zeros)(buffer.size, dtype)
        self.plan()

    def plan(self) -> None:
        """Plan the reduction for the present ranks, again after some have died. Collective."""
        self._reduction = plan_reduction(self._transport, self._sum, self._algorithm, scatter_gather=True)

    def reduce_scatter(self, each: Each | None = None) -> Array:
        self._module.copyto(self._sum, self._buffer)
        self._reduction.all_reduce(mean=False)
        visit(self._sum, each)
        return self._sum

    def all_gather(self) -> None:
        return

    def all_reduce(self, mean: bool) -> None:
        store(self.reduce_scatter(), self._buffer, self._transport.size if mean else 1)
