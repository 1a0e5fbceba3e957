"""The binding for ``horovod.torch``, which accepts torch tensors. Imported only when it is chosen."""

from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import torch
from horovod.torch import mpi_ops

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, ReduceOp
from lentando.comm.transports.horovod.binding import HorovodBinding, HorovodWorld, translated_error

__all__ = ["TorchBinding", "open_binding"]

if not hasattr(hvd, "init"):  # the Python part can be imported without the compiled one
    raise ImportError("Horovod is installed, but was not built for PyTorch")


def open_binding() -> HorovodBinding:
    """Return the binding, and join Horovod's job, unless the program has."""
    return TorchBinding()


class TorchBinding(HorovodWorld):
    """Horovod, built for PyTorch."""

    module = "horovod.torch"

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
    """A collective in flight.

    Args:
        start: function that submits the collective and returns its handle.
        in_place: array that holds the result; None if the result is a new array.
    """

    def __init__(self, start: Callable[[], int], in_place: Array | None = None) -> None:
        self._in_place = in_place
        with _TranslatedErrors():
            self._handle = start()
        # hvd.init() clears this dictionary of Horovod, also when Horovod is initialised already. Another rank may start
        # a round at any time, so the program cannot know that nothing is in flight when it calls init().
        self._tensors = mpi_ops._handle_map.get(self._handle)  # noqa: SLF001

    def done(self) -> bool:
        with _TranslatedErrors():
            return bool(hvd.poll(self._handle))

    def result(self) -> Array:
        if self._tensors is not None:
            mpi_ops._handle_map.setdefault(self._handle, self._tensors)  # noqa: SLF001
        with _TranslatedErrors():
            output: Any = hvd.synchronize(self._handle)
        if self._in_place is not None:
            return self._in_place
        if output is None:  # init() was called between the two lines of __init__
            raise TransportError(
                "hvd.init() was called while messages were in flight: call it before init(), or not at all"
            )
        tensor: torch.Tensor = output[0] if isinstance(output, tuple) else output
        return tensor.numpy()


class _TranslatedErrors:
    """A context that turns an error of Horovod into one of Lentando."""

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        # HorovodInternalError is a RuntimeError. A ValueError means that Horovod was shut down.
        if isinstance(error, RuntimeError | ValueError):
            raise translated_error(error) from error
