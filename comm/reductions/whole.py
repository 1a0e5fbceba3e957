"""The sum over ranks, whole on every rank, beside a buffer that stays what it is: what an elastic job averages by."""

from lentando.comm.array_module import array_module, is_on_host
from lentando.comm.collectives import Algorithm, plan_reduction
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.reductions.reduction import Each, store, visit
from lentando.comm.shared_memory import shared_zeros
from lentando.comm.transport import Array, Transport, shares_memory

__all__ = ["WholeReduction"]


class WholeReduction:
    """Both halves of an all-reduce in the first, on a copy; nothing is left to do in the second.

    If a rank dies meanwhile, nothing has happened. Costs one more copy of the buffer, in float32 at least.

    Args:
        transport: ranks that take part.
        buffer: one-dimensional and contiguous.
        algorithm: see ``lentando.comm.collectives.plan_reduction``. The sum is formed as in the halves of that.
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
        """Plan the messages for the ranks that there are now. Collective."""
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
