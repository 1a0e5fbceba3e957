"""The all-reduce of a job with a single rank, behind the same interface."""

from lentando.comm.array_module import array_module
from lentando.comm.dtypes import accumulator_dtype
from lentando.comm.flat import blocks
from lentando.comm.reductions.reduction import Each
from lentando.comm.transport import Array

__all__ = ["NoReduction"]


class NoReduction:
    """A reduction that sends nothing: this rank owns the whole buffer as its shard."""

    def __init__(self, buffer: Array) -> None:
        self._buffer = buffer
        self.shard = slice(0, buffer.size)
        self._module = array_module(buffer)
        self._scratch: Array = self._module.empty(buffer.size, accumulator_dtype(buffer.dtype))
        self._blocks = [self._scratch[block] for block in blocks(self._scratch)]

    def reduce_scatter(self, each: Each | None = None) -> Array:
        self._module.copyto(self._scratch, self._buffer)
        if each is not None:
            for block in self._blocks:
                each(block)
        return self._scratch

    def all_gather(self) -> None:
        return

    def all_reduce(self, mean: bool) -> None:
        return
