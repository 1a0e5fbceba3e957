"""NumPy's memory as torch tensors, which is what ``horovod.torch`` takes. Imported only when it is chosen."""

from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import torch

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, ReduceOp
from lentando.comm.transports.horovod.engine import Engine, HorovodWorld, as_ours

__all__ = ["TorchEngine", "open_engine"]

if not hasattr(hvd, "init"):  # its Python part imports without the compiled one
    raise ImportError("Horovod is installed, but was not built for PyTorch")


def open_engine() -> Engine:
    """Join Horovod's job, unless the program has."""
    return TorchEngine()


class TorchEngine(HorovodWorld):
    """Horovod as built for PyTorch."""

    binding = "horovod.torch"

    def __init__(self) -> None:
        super().__init__(hvd)

    def allreduce(self, name: str, array: Array, op: ReduceOp) -> "_Collective":
        operation = self._operations[op]
        return _Collective(lambda: hvd.allreduce_async_(torch.from_numpy(array), name=name, op=operation), array)

    def broadcast(self, name: str, memory: Array, root: int) -> "_Collective":
        return _Collective(lambda: hvd.broadcast_async_(torch.from_numpy(memory), root, name=name), memory)

    def allgather(self, name: str, memory: Array) -> "_Collective":
        return _Collective(lambda: hvd.allgather_async(torch.from_numpy(memory), name=name))

    def alltoall(self, name: str, words: Array, splits: Sequence[int]) -> "_Collective":
        lengths = torch.tensor(splits, dtype=torch.int32)
        return _Collective(lambda: hvd.alltoall_async(torch.from_numpy(words), lengths, name=name))


class _Collective:
    """An operation under way.

    Args:
        start: asks Horovod for it; returns its handle.
        in_place: the array that it works on; None if the result is a new one.
    """

    def __init__(self, start: Callable[[], int], in_place: Array | None = None) -> None:
        self._in_place = in_place
        with _translated():
            self._handle = start()

    def done(self) -> bool:
        with _translated():
            return bool(hvd.poll(self._handle))

    def result(self) -> Array:
        with _translated():
            found: Any = hvd.synchronize(self._handle)
        if self._in_place is not None:
            return self._in_place
        if found is None:  # init() forgets the results of operations under way
            raise TransportError("hvd.init() was called while messages were under way: call it before init(), or not")
        tensor: torch.Tensor = found[0] if isinstance(found, tuple) else found
        return tensor.numpy()


class _translated:  # noqa: N801 - reads as a word in a with statement
    """Turns an error of Horovod's into ours."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # HorovodInternalError is one; ValueError says that it was shut down.
        if isinstance(error, RuntimeError | ValueError):
            raise as_ours(error) from error
