"""All-reduce by the backend's own collectives: those of MPI, Horovod or NCCL."""

from lentando.comm.array_module import array_module
from lentando.comm.capabilities import BackendReduceScatter
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.errors import ConfigurationError
from lentando.comm.reductions import ring_schedule
from lentando.comm.reductions.reduction import Each, store, visit
from lentando.comm.transport import Array, Transport

__all__ = ["BackendReduction", "BackendShardedReduction"]


class BackendReduction:
    """The backend's own all-reduce: the least latency for small buffers, at the price of a full-size scratch copy.

    Args:
        transport: transport that connects the participating ranks.
        buffer: one-dimensional, contiguous array; read and written in place at every execution.
    """

    def __init__(self, transport: Transport, buffer: Array) -> None:
        self._transport = transport
        self._buffer = buffer
        size = transport.size
        self.shard = ring_schedule.shard(transport.rank, size, buffer.size)
        self._shards = [ring_schedule.shard(rank, size, buffer.size) for rank in range(size)]
        self._module = array_module(buffer)
        self._scratch: Array = self._module.empty(buffer.size, accumulator_dtype(buffer.dtype))
        self._padded = self._module.zeros(-(-buffer.size // size), buffer.dtype)  # ``allgather`` takes equal shapes

    def reduce_scatter(self, each: Each | None = None) -> Array:
        self._reduce()
        total = self._scratch[self.shard]
        visit(total, each)
        return total

    def all_gather(self) -> None:
        self._padded[: self.shard.stop - self.shard.start] = self._buffer[self.shard]
        gathered = self._transport.allgather(self._padded)
        for rank, part in enumerate(self._shards):
            self._buffer[part] = gathered[rank, : part.stop - part.start]

    def all_reduce(self, mean: bool) -> None:
        total = self._buffer
        if self._scratch.dtype == total.dtype:
            self._transport.allreduce(total)  # saves two copies
        else:
            self._reduce()
            total = self._scratch
        store(total, self._buffer, self._transport.size if mean else 1)

    def _reduce(self) -> None:
        self._module.copyto(self._scratch, self._buffer)
        self._transport.allreduce(self._scratch)


class BackendShardedReduction:
    """The backend's own reduce-scatter and all-gather (NCCL's), for arrays on a GPU.

    A backend cuts a buffer into equal parts. A buffer that cannot be cut in this way, or whose sum is formed in another
    dtype, is copied on the device, which costs little compared to the network.

    Args:
        transport: transport that connects the participating ranks, a ``BackendReduceScatter``.
        buffer: one-dimensional, contiguous array; read and written in place at every execution.

    Raises:
        ConfigurationError: if the transport is no ``BackendReduceScatter``.
    """

    def __init__(self, transport: Transport, buffer: Array) -> None:
        if not isinstance(transport, BackendReduceScatter):
            raise ConfigurationError(f"transport {transport.name!r} has no reduce-scatter of its own")
        self._backend = transport
        self._buffer = buffer
        self._size = transport.size
        self._module = array_module(buffer)
        accumulator = accumulator_dtype(buffer.dtype)
        part = -(-buffer.size // transport.size)
        start = part * transport.rank
        self.shard = slice(min(start, buffer.size), min(start + part, buffer.size))
        is_even = part * transport.size == buffer.size
        self._terms = self._gathered = buffer
        if not is_even or accumulator != buffer.dtype:
            self._terms = self._module.zeros(part * transport.size, accumulator)
        if not is_even:
            self._gathered = self._module.zeros(part * transport.size, buffer.dtype)
        self._part = self._gathered[start : start + part]
        self._sum: Array = self._module.zeros(part, accumulator)

    def reduce_scatter(self, each: Each | None = None) -> Array:
        if self._terms is not self._buffer:
            self._module.copyto(self._terms[: self._buffer.size], self._buffer)
        self._backend.reduce_scatter(self._terms, self._sum)
        total = self._sum[: self.shard.stop - self.shard.start]
        visit(total, each)
        return total

    def all_gather(self) -> None:
        if self._gathered is self._buffer:
            self._backend.allgather_into(self._part, self._gathered)
            return
        self._module.copyto(self._part[: self.shard.stop - self.shard.start], self._buffer[self.shard])
        self._backend.allgather_into(self._part, self._gathered)
        self._module.copyto(self._buffer, self._gathered[: self._buffer.size])

    def all_reduce(self, mean: bool) -> None:
        store(self.reduce_scatter(), self._buffer[self.shard], self._size if mean else 1)
        self.all_gather()
