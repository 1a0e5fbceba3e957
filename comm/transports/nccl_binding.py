"""The functions of NCCL and CUDA that Lentando calls, as a protocol that tests can implement without a GPU.

Written against nccl4py 0.6 and CuPy 14, never run on a GPU.

NCCL is called through nccl4py, NVIDIA's binding, which checks device, dtype (including bfloat16) and length of each
array, and reports NCCL's last error message. ``cupy.cuda.nccl`` would save a package, but takes plain addresses and
numbers, and reports only the kind of an error. Arrays, streams and events are those of CuPy.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from hashlib import blake2b
from importlib.util import find_spec
from typing import Any, Protocol

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, ReduceOp

__all__ = ["Binding", "Communicator", "Mark", "NCCLBinding"]

INSTALL = "pip install 'lentando[gpu]' installs both, for CUDA 13"


class Mark(Protocol):
    """A point in the work that is enqueued on a device."""

    @property
    def done(self) -> bool:
        """Whether the device has reached this point, without waiting for it."""


class Communicator(Protocol):
    """One rank of an NCCL communicator, with its own stream.

    Operations are called inside ``group``, which enqueues them as one operation, so that they progress together.
    """

    @property
    def device(self) -> int:
        """Number of the device of this rank."""

    def group(self) -> AbstractContextManager[None]:
        """Enqueue the operations called inside the block, after all work of the current stream."""

    def send(self, array: Array, peer: int) -> None:
        """Send an array of bytes to a peer."""

    def receive(self, array: Array, peer: int) -> None:
        """Receive an array of bytes from a peer."""

    def allreduce(self, array: Array, op: ReduceOp) -> None:
        """Reduce an array over all ranks, in place."""

    def broadcast(self, array: Array, root: int) -> None:
        """Broadcast an array of bytes from rank ``root``, in place."""

    def allgather(self, part: Array, out: Array) -> None:
        """Gather arrays of bytes by rank; ``part`` may be this rank's part of ``out``."""

    def reduce_scatter(self, array: Array, out: Array) -> None:
        """Fill ``out`` with this rank's part of the sum of ``array`` over all ranks."""

    def mark(self) -> Mark:
        """Return the end of the work that has been enqueued so far."""

    def error(self) -> str | None:
        """Return NCCL's message for an asynchronous error, or None, without blocking."""

    def abort(self) -> None:
        """Abort all operations in flight, and release all resources."""

    def close(self) -> None:
        """Release all resources. All ranks call it, without operations in flight."""


class Binding(Protocol):
    """NCCL as it is installed for this process."""

    def problem(self) -> str | None:
        """Return why NCCL cannot be used in this process, and what to do; None if it can."""

    def unique_id(self) -> bytes:
        """Return the identifier of a new communicator, which one rank creates for all."""

    def device_of(self, array: Array) -> int:
        """Return the number, in this process, of the device that holds the array."""

    def identity(self, device: int) -> bytes:
        """Return bytes of fixed length that identify a device within the cluster."""

    def open(self, size: int, rank: int, unique_id: bytes, device: int) -> Communicator:
        """Join a communicator. Collective: returns when all ranks have called it."""


class NCCLBinding:
    """NCCL through nccl4py, with the arrays of CuPy."""

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
            return "nccl4py finds no NCCL library: pip install nvidia-nccl-cu13, or add libnccl.so.2 to the search path"
        return None

    def unique_id(self) -> bytes:
        import nccl.core

        with _translated_errors("ncclGetUniqueId"):
            return bytes(nccl.core.get_unique_id())

    def device_of(self, array: Array) -> int:
        device: Any = array.device
        number: int = device.id
        return number

    def identity(self, device: int) -> bytes:
        from cuda.core import Device  # a dependency of nccl4py

        uuid: str = Device(device).uuid
        return blake2b(uuid.encode(), digest_size=16).digest()

    def open(self, size: int, rank: int, unique_id: bytes, device: int) -> Communicator:
        return _NCCLCommunicator(size, rank, unique_id, device)


class _NCCLCommunicator:
    """A communicator of nccl4py."""

    def __init__(self, size: int, rank: int, unique_id: bytes, device: int) -> None:
        import cupy
        import nccl.core

        self.device = device
        self._cupy, self._nccl = cupy, nccl.core
        self._ops = {"sum": nccl.core.SUM, "min": nccl.core.MIN, "max": nccl.core.MAX}
        with _translated_errors("ncclCommInitRank"), cupy.cuda.Device(device):
            # Non-blocking, because otherwise this stream and the default stream would wait for each other.
            self._stream = cupy.cuda.Stream(non_blocking=True)
            self._comm = nccl.core.Communicator.init(size, rank, nccl.core.UniqueId.from_bytes(unique_id))

    @contextmanager
    def group(self) -> Iterator[None]:
        with _translated_errors("NCCL"), self._cupy.cuda.Device(self.device):
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
        with _translated_errors("ncclCommDestroy"), self._cupy.cuda.Device(self.device):
            self._stream.synchronize()
            self._comm.destroy()


class _Mark:
    """A CUDA event, recorded on a stream."""

    def __init__(self, event: Any) -> None:
        self._event = event

    @property
    def done(self) -> bool:
        with _translated_errors("work on the GPU"):
            done: bool = self._event.done
        return done


@contextmanager
def _translated_errors(call: str) -> Iterator[None]:
    """Turn an error of nccl4py or CuPy, which have no public base class in common, into one of Lentando."""
    try:
        yield
    except TransportError:
        raise
    except Exception as error:
        raise TransportError(f"{call} failed: {error}") from error
