"""All that Lentando calls of NCCL and CUDA, so that a stand-in can take its place where there is neither.

Written against nccl4py 0.6 and CuPy 14, never run on a GPU.

NCCL is called through nccl4py, NVIDIA's own binding: it holds device, dtype (bfloat16 too) and length of each array
against the call, and tells NCCL's last words on an error. ``cupy.cuda.nccl`` would be one package less, but takes bare
addresses and numbers, and tells no more of an error than its kind. Arrays, streams and events are CuPy's.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any, Protocol

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, ReduceOp

__all__ = ["Binding", "Communicator", "Mark", "NCCLBinding"]

INSTALL = "pip install 'lentando[gpu]' brings both, for CUDA 13"


class Mark(Protocol):
    """A moment in the device's work.

    Attributes:
        done: whether the device has come there; asked without waiting.
    """

    @property
    def done(self) -> bool:
        """See above."""


class Communicator(Protocol):
    """One rank's part in an NCCL communicator, with a stream of its own.

    The operations are called inside ``group``, which enqueues them as one: they progress together.
    """

    @property
    def device(self) -> int:
        """Number of its device."""

    def group(self) -> AbstractContextManager[None]:
        """Enqueue what is called inside, after all that the current stream has been given to do."""

    def send(self, array: Array, peer: int) -> None:
        """Send bytes."""

    def receive(self, array: Array, peer: int) -> None:
        """Receive as many bytes."""

    def allreduce(self, array: Array, op: ReduceOp) -> None:
        """In place."""

    def broadcast(self, array: Array, root: int) -> None:
        """In place, bytes."""

    def allgather(self, part: Array, out: Array) -> None:
        """Bytes; ``part`` may lie in its place in ``out``."""

    def reduce_scatter(self, array: Array, out: Array) -> None:
        """The sum of this rank's part."""

    def mark(self) -> Mark:
        """The end of what has been enqueued so far."""

    def error(self) -> str | None:
        """What has gone wrong since, in NCCL's words, or None. Never blocks."""

    def abort(self) -> None:
        """End what is under way, wherever it is, and release everything."""

    def close(self) -> None:
        """Release everything. Every rank does so, with nothing under way."""


class Binding(Protocol):
    """What there is of NCCL in this process."""

    def problem(self) -> str | None:
        """Why NCCL cannot be used here, and what to do, or None."""

    def unique_id(self) -> bytes:
        """A new communicator's name; made by one rank, for all."""

    def device_of(self, array: Array) -> int:
        """Number of the device that holds the array, as this process counts."""

    def identity(self, device: int) -> bytes:
        """What tells a device from every other of the cluster; always of one length."""

    def open(self, size: int, rank: int, unique_id: bytes, device: int) -> Communicator:
        """Join a communicator. Collective: returns when all ranks have come."""


class NCCLBinding:
    """The real one."""

    def problem(self) -> str | None:
        for package, module in (("CuPy", "cupy"), ("nccl4py", "nccl")):
            if find_spec(module) is None:
                return f"{package} is not installed ({INSTALL})"
        try:
            import cupy
            import nccl.core
        except (ImportError, RuntimeError, OSError) as error:
            return f"CuPy or nccl4py cannot be loaded ({error})"
        try:
            if cupy.cuda.runtime.getDeviceCount() == 0:
                return "this process sees no GPU: is CUDA_VISIBLE_DEVICES empty?"
        except cupy.cuda.runtime.CUDARuntimeError as error:
            return f"this process sees no GPU ({error})"
        if nccl.core.get_version().libnccl is None:
            return "nccl4py finds no NCCL library: pip install nvidia-nccl-cu13, or put libnccl.so.2 where it is found"
        return None

    def unique_id(self) -> bytes:
        import nccl.core

        with _translated("ncclGetUniqueId"):
            return bytes(nccl.core.get_unique_id())

    def device_of(self, array: Array) -> int:
        device: Any = array.device
        number: int = device.id
        return number

    def identity(self, device: int) -> bytes:
        from cuda.core import Device  # which nccl4py brings

        uuid: str = Device(device).uuid
        return blake2b(uuid.encode(), digest_size=16).digest()

    def open(self, size: int, rank: int, unique_id: bytes, device: int) -> Communicator:
        return _NCCLCommunicator(size, rank, unique_id, device)


class _NCCLCommunicator:
    def __init__(self, size: int, rank: int, unique_id: bytes, device: int) -> None:
        import cupy
        import nccl.core

        self.device = device
        self._cupy, self._nccl = cupy, nccl.core
        self._ops = {"sum": nccl.core.SUM, "min": nccl.core.MIN, "max": nccl.core.MAX}
        with _translated("ncclCommInitRank"), cupy.cuda.Device(device):
            # Not blocking: the default stream would wait for this one, and this one for it.
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._comm = nccl.core.Communicator.init(size, rank, nccl.core.UniqueId.from_bytes(unique_id))

    @contextmanager
    def group(self) -> Iterator[None]:
        with _translated("NCCL"), self._cupy.cuda.Device(self.device):
            before = self._cupy.cuda.Event(disable_timing=True)
            before.record(self._cupy.cuda.get_current_stream())
            self._stream.wait_event(before)
            with self._nccl.group():
                yield

    def send(self, array: Array, peer: int) -> None:
        self._comm.send(array, peer, stream=self._stream.ptr)

    def receive(self, array: Array, peer: int) -> None:
        self._comm.recv(array, peer, stream=self._stream.ptr)

    def allreduce(self, array: Array, op: ReduceOp) -> None:
        self._comm.allreduce(array, array, self._ops[op], stream=self._stream.ptr)

    def broadcast(self, array: Array, root: int) -> None:
        self._comm.broadcast(array, array, root, stream=self._stream.ptr)

    def allgather(self, part: Array, out: Array) -> None:
        self._comm.allgather(part, out, stream=self._stream.ptr)

    def reduce_scatter(self, array: Array, out: Array) -> None:
        self._comm.reduce_scatter(array, out, self._ops["sum"], stream=self._stream.ptr)

    def mark(self) -> Mark:
        with self._cupy.cuda.Device(self.device):
            event = self._cupy.cuda.Event(disable_timing=True)
            self._stream.record(event)
        return _Mark(event)

    def error(self) -> str | None:
        state = int(self._comm.get_async_error())
        if state == 0:  # ncclSuccess
            return None
        return f"{self._nccl.get_error_string(state)}; {self._comm.get_last_error()}"

    def abort(self) -> None:
        self._comm.abort()

    def close(self) -> None:
        with _translated("ncclCommDestroy"), self._cupy.cuda.Device(self.device):
            self._stream.synchronize()
            self._comm.destroy()


class _Mark:
    def __init__(self, event: Any) -> None:
        self._event = event

    @property
    def done(self) -> bool:
        with _translated("work on the GPU"):
            done: bool = self._event.done
        return done


@contextmanager
def _translated(call: str) -> Iterator[None]:
    """Turns an error of the packages', whose classes have no public name in common, into ours."""
    try:
        yield
    except TransportError:
        raise
    except Exception as error:
        raise TransportError(f"{call} failed: {error}") from error
