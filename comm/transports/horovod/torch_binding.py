"""The binding for ``horovod.torch``, which accepts torch tensors. Imported only when it is chosen."""

from collections.abc import Callable, Sequence
from typing import Any

import horovod.torch as hvd
import numpy as np
import torch
from horovod.torch import mpi_ops

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, ReduceOp
from lentando.comm.transports.horovod.binding import HorovodBinding, HorovodWorld, translated_error

__all__ = ["TorchBinding", "open_binding"]

if not hasattr(hvd, "init"):  # the Python part can be imported without the compiled one
    raise ImportError("Horovod is installed, but was not built for PyTorch")

_ALL_RANKS = hvd.global_process_set


def open_binding() -> HorovodBinding:
    """Return the binding, and join Horovod's job, unless the program has."""
    return TorchBinding()


class TorchBinding(HorovodWorld):
    """Horovod, built for PyTorch."""

    module = "horovod.torch"

    def __init__(self) -> None:
        super().__init__(hvd)

    def allreduce(self, name: str, array: Array, op: ReduceOp) -> "_Collective":
        tensor, operation = _tensor(array), self._operations[op]
        return _Collective(lambda: hvd.allreduce_async_(tensor, name=name, op=operation), [tensor], array)

    def broadcast(self, name: str, memory: Array, root: int) -> "_Collective":
        tensor = _tensor(memory)
        return _Collective(lambda: hvd.broadcast_async_(tensor, root, name=name), [tensor], memory)

    def allgather(self, name: str, memory: Array) -> "_Collective":
        tensors = _tensor(memory), _output(memory)
        return _Collective(lambda: mpi_ops._allgather_async(*tensors, name, _ALL_RANKS), tensors)  # noqa: SLF001

    def alltoall(self, name: str, words: Array, splits: Sequence[int]) -> "_Collective":
        lengths = np.array(splits, np.int32)
        tensors = _tensor(words), _tensor(lengths), _output(words), _output(lengths)
        return _Collective(lambda: mpi_ops._alltoall_async(*tensors, name, _ALL_RANKS), tensors)  # noqa: SLF001


# In inference mode, the view of a tensor does not own the tensor: see _Collective.


def _tensor(array: Array) -> torch.Tensor:
    """Return a tensor in the memory of an array."""
    with torch.inference_mode(False):
        return torch.from_numpy(array)


def _output(like: Array) -> torch.Tensor:
    """Return a tensor of the dtype of an array, empty, for Horovod to resize."""
    with torch.inference_mode(False):
        return torch.empty(0, dtype=torch.from_numpy(like).dtype)


class _Collective:
    """A collective in flight.

    Args:
        start: function that submits the collective and returns its handle.
        tensors: all tensors that it passes to Horovod.
        in_place: array that holds the result; None if the result is a new array.
    """

    def __init__(
        self, start: Callable[[], int], tensors: Sequence[torch.Tensor], in_place: Array | None = None
    ) -> None:
        self._in_place = in_place
        # When Horovod's background thread ends, it locks its tables and then releases the tensors of all pending
        # collectives. A thread that submits another one at that moment holds Python's lock and waits for the tables.
        # They would wait for each other: PyTorch 2.13 needs Python's lock where the last owner of a tensor, other than
        # Python, releases it. Horovod must not be the last one. A view owns its tensor, too; it lives as long as the
        # handle.
        with torch.inference_mode(False):
            views = [tensor.view_as(tensor) for tensor in tensors]
        with _TranslatedErrors():
            self._handle = start()
        # hvd.init() clears this dictionary of Horovod, also when Horovod is initialised already. Another rank may start
        # a round at any time, so the program cannot know that nothing is in flight when it calls init().
        self._tensors = mpi_ops._handle_map.get(self._handle)  # noqa: SLF001
        if self._tensors is not None:
            self._tensors = mpi_ops._handle_map[self._handle] = (views, *self._tensors)  # noqa: SLF001

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
