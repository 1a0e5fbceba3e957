"""MPI through mpi4py. Works with any MPI that mpi4py was loaded with; owns nothing of the user's."""

import ctypes
import os
import sys
import time
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any, NoReturn
from weakref import WeakSet

import numpy as np
from mpi4py import MPI

from lentando.comm.array_module import array_module, is_on_host
from lentando.comm.closed import mark_closed
from lentando.comm.errors import ConfigurationError, TransportError
from lentando.comm.extremes import from_ordered, needs_order, to_ordered
from lentando.comm.forked import refuse_in_children
from lentando.comm.pieces import longest_elements, pieces
from lentando.comm.transport import Array, Message, ReduceOp, Request, Traffic, Transport, as_bytes
from lentando.comm.transports.mpi.exchange import POLL_SECONDS, MPIExchange, ProgressThread

__all__ = ["OPS", "MPITransport"]

OPS: dict[str, MPI.Op] = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}

EAGER_BYTES = 64_000
"""Larger messages cross the network in pieces of this size, which Open MPI sends over TCP without asking first.

A large one waits for the receiver's consent, which queues on the same connection behind what the receiver is sending
itself: two ranks that send to each other then take turns, at half of the link's speed. MPICH does the same. Open MPI's
limit is 64 KiB, its header included.
"""


NOTICE_TAG = 32_768
"""Keeps notices apart from all messages of ``exchange``, whose tags end below."""


class MPITransport:
    """Ranks of an MPI communicator.

    The communicator is duplicated, so Lentando's messages can never meet the user's own.

    Args:
        comm: the ranks that take part; all of ``MPI.COMM_WORLD`` by default.
    """

    name = "mpi"
    takes_device_arrays: bool
    """Whether this MPI reads and writes a GPU's memory; see ``_takes_device_arrays``. Implements ``DeviceArrays``."""
    yields_cpu = False
    """MPI's own waiting spins, and would take a core from threads that communicate. Implements ``YieldsCPU``."""

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        self._translated = _Translated(self._as_ours)
        self._comm: MPI.Intracomm
        self.same_node: Sequence[int]
        ranks = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._node = ranks.Split_type(MPI.COMM_TYPE_SHARED)
        self._sit_down(ranks, self._node.allgather(ranks.Get_rank()))
        takes = np.array([_takes_device_arrays()], np.int32)
        self._comm.Allreduce(MPI.IN_PLACE, takes, MPI.MIN)  # or one rank's model would be on a GPU, and another's not
        self.takes_device_arrays = bool(takes[0])
        self.traffic = Traffic()
        self._progress = ProgressThread() if MPI.Query_thread() == MPI.THREAD_MULTIPLE else None
        self._side_channel: MPI.Intracomm | None = None
        self._others: list[MPITransport] = []
        self._whispered: list[MPI.Request] = []
        self._notices: list[MPI.Request] = []
        refuse_in_children(self)
        _open.add(self)
        _notice_finalize()

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        comm, traffic = self._comm, self.traffic
        pending: list[MPI.Request] = []
        request = MPIExchange(pending, _settled(*(array for _, array in (*sends, *receives))), self._as_ours, self.rank)
        self._begins(request)
        try:
            # Receives first: a message that finds its receive posted is not copied through a buffer of MPI's.
            pending.extend(
                comm.Irecv((piece, MPI.BYTE), peer, tag)
                for peer, array in receives
                for piece in self._pieces(peer, array)
            )
            for peer, array in sends:
                pending.extend(comm.Isend((piece, MPI.BYTE), peer, tag) for piece in self._pieces(peer, array))
                traffic.messages += 1
                traffic.bytes_sent += array.nbytes
        except MPI.Exception as error:
            raise self._as_ours(error) from error
        if overlap and self._progress is not None:
            self._progress.submit(request)
        return request

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        if needs_order(array, op):  # MPI leaves open what becomes of NaN
            ordered = to_ordered(array, op)
            self._reduce(ordered, op)
            from_ordered(ordered, array)
        elif op == "sum" and array.dtype.kind in "iu" and array.dtype.itemsize < 4:
            wide = array.astype(np.int32)  # Open MPI's own sums of short integers wrap around for some elements only
            self._reduce(wide, op)
            array[...] = wide.astype(array.dtype)
        else:
            self._reduce(array, op)
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def _reduce(self, array: Array, op: ReduceOp) -> None:
        _settled(array)
        for piece in pieces(array.reshape(-1)):
            self._complete(self._comm.Allreduce, self._comm.Iallreduce, MPI.IN_PLACE, piece, OPS[op])

    def broadcast(self, array: Array, root: int = 0) -> None:
        _settled(array)
        with self._translated:
            for piece in pieces(as_bytes(array)):
                self._comm.Bcast((piece, MPI.BYTE), root)
        self.traffic.count_collective(array.nbytes if self.rank == root and self.size > 1 else 0)

    def allgather(self, array: Array) -> Array:
        gathered: Array = array_module(array).empty((self.size, *array.shape), array.dtype)
        _settled(array)
        own, by_rank = as_bytes(array), as_bytes(gathered).reshape(self.size, -1)
        longest, start = longest_elements(1, self.size), 0
        for piece in pieces(own, longest):
            is_whole = piece.size == own.size
            place = by_rank if is_whole else array_module(array).empty((self.size, piece.size), np.uint8)
            self._complete(self._comm.Allgather, self._comm.Iallgather, (piece, MPI.BYTE), (place, MPI.BYTE))
            if not is_whole:
                by_rank[:, start : start + piece.size] = place
            start += piece.size
        self.traffic.count_collective(array.nbytes * (self.size - 1))
        return gathered

    def barrier(self) -> None:
        with self._translated:
            self._comm.Barrier()
        self.traffic.count_collective(0)

    def node_barrier(self) -> None:
        self._complete(self._node.Barrier, self._node.Ibarrier)
        self.traffic.count_collective(0)

    def clock(self) -> float:
        return time.perf_counter()

    def abort(self, status: int = 1) -> NoReturn:
        sys.stdout.flush()
        sys.stderr.flush()
        self._comm.Abort(status)
        raise SystemExit(status)  # MPI_Abort does not return

    def open_side_channel(self) -> bool:
        if MPI.Query_thread() == MPI.THREAD_MULTIPLE and self._side_channel is None:
            self._side_channel = self._comm.Dup()
        return self._side_channel is not None

    def for_thread(self) -> Transport | None:
        from lentando.comm.transports.mpi.background import BackgroundMPITransport

        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            return None
        self.yields_cpu = True
        self._others.append(BackgroundMPITransport(self._comm))
        return self._others[-1]

    def send_nowait(self, peer: int, content: bytes) -> None:
        assert self._side_channel is not None
        with self._translated:
            self._whispered = [request for request in self._whispered if not request.Test()]
            self._whispered.append(self._side_channel.Isend((content, MPI.BYTE), peer))

    def receive_nowait(self) -> tuple[int, bytes] | None:
        assert self._side_channel is not None
        status = MPI.Status()
        with self._translated:
            if not self._side_channel.Iprobe(status=status):
                return None
            content = bytearray(status.Get_count(MPI.BYTE))
            self._side_channel.Recv((content, MPI.BYTE), status.Get_source())
        return status.Get_source(), bytes(content)

    def leave_notice(self, peer: int, number: int) -> None:
        with self._translated:
            self._notices = [request for request in self._notices if not request.Test()]
            self._notices.append(self._comm.Isend(np.array([number], np.int64), peer, NOTICE_TAG))

    def read_notice(self, peer: int) -> int | None:
        with self._translated:
            return self.take_notice(peer) if self._comm.Iprobe(peer, NOTICE_TAG) else None

    def take_notice(self, peer: int) -> int:
        notice = np.zeros(1, np.int64)
        with self._translated:
            self._comm.Recv(notice, peer, NOTICE_TAG)
        return int(notice[0])

    def close(self) -> None:
        for other in self._others:
            other.close()
        if self._progress is not None:
            self._progress.close()
        if self._side_channel is not None:
            self._side_channel.Free()
        if self._node:
            self._node.Free()
        self._comm.Free()
        _open.discard(self)
        mark_closed(self)  # Open MPI would crash where it is given a communicator that was freed

    def end_with_mpi(self) -> None:
        """MPI is about to end, by the program's own call: nothing of ours may call it again, and nothing is freed."""
        if self._progress is not None:
            self._progress.close()
        mark_closed(self)

    def _complete(self, spinning: Callable[..., object], starting: Callable[..., MPI.Request], *arguments: Any) -> None:
        """A collective of MPI's, by that of its two calls which suits: a patient rank asks every now and then."""
        with self._translated:
            if not self.yields_cpu:
                spinning(*arguments)
                return
            request = starting(*arguments)
            while not request.Test():
                self._pause()

    def _pause(self) -> None:
        """Between two questions about what is under way."""
        time.sleep(POLL_SECONDS)

    def _sit_down(self, comm: MPI.Intracomm, same_node: Sequence[int]) -> None:
        """Take this rank's place in a communicator, some of whose ranks are on its node."""
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # mpi4py turns the codes into exceptions
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.same_node = same_node
        self.local_rank, self.local_size = same_node.index(self.rank), len(same_node)
        self._piece_bytes = [sys.maxsize if peer in same_node else EAGER_BYTES for peer in range(self.size)]

    def _begins(self, request: MPIExchange) -> None:
        """An exchange is about to start: for subclasses that keep account of them."""

    def _as_ours(self, error: MPI.Exception, statuses: Sequence[MPI.Status] = ()) -> TransportError:
        # An error "in status" is told apart by the status of each request; those that never started are only pending.
        codes = [code for status in statuses if (code := status.Get_error()) not in (MPI.SUCCESS, MPI.ERR_PENDING)]
        return TransportError(f"MPI failed: {MPI.Get_error_string(codes[0]) if codes else error.Get_error_string()}")

    def _pieces(self, peer: int, array: Array) -> list[Array]:
        """The messages that carry an array to or from a peer."""
        memory, longest = as_bytes(array), longest_elements(1)
        # MPI's own pipeline from the GPU wants long messages. A peer that does not exist is MPI's to report.
        if is_on_host(array) and 0 <= peer < self.size:
            longest = min(longest, self._piece_bytes[peer])
        return [memory] if memory.size <= longest else list(pieces(memory, longest))


_open: WeakSet[MPITransport] = WeakSet()
"""Those of this process that are not closed."""
_finalize_keys: list[int] = []


def _notice_finalize() -> None:
    """Let the open transports know when the program calls ``MPI.Finalize()`` itself.

    MPI deletes the attributes of ``COMM_SELF`` before it begins to end. At the end of the interpreter, where mpi4py
    ends MPI, Python is no longer called, and need not be.
    """
    if not _finalize_keys:
        _finalize_keys.append(MPI.Comm.Create_keyval(delete_fn=_on_finalize))
        MPI.COMM_SELF.Set_attr(_finalize_keys[0], True)


def _on_finalize(*_: object) -> None:
    for transport in list(_open):
        transport.end_with_mpi()


def _takes_device_arrays() -> bool:
    """Whether device arrays can be given to MPI as they are: a CUDA-aware MPI, beside CuPy to make them.

    MPI is asked in the standard's way (4.1) and in Open MPI's older one. ``LENTANDO_CUDA_AWARE_MPI=0|1`` knows better
    than either. Written, and tested with addresses in host memory; never run on a GPU.
    """
    override = os.environ.get("LENTANDO_CUDA_AWARE_MPI")
    if override not in (None, "0", "1"):
        raise ConfigurationError(f"LENTANDO_CUDA_AWARE_MPI={override!r}: expected 0 or 1")
    if override is not None:
        return override == "1"
    if find_spec("cupy") is None:
        return False
    info = MPI.COMM_WORLD.Get_info()
    kinds = info.Get("mpi_memory_alloc_kinds")
    info.Free()
    if kinds is not None and "cuda" in kinds:
        return True
    try:
        query = ctypes.CDLL(MPI.__file__).MPIX_Query_cuda_support
    except (AttributeError, OSError):  # MPI is another, or not among what the module was linked with
        return False
    return bool(query())


def _settled(*arrays: Array) -> Any:
    """The device of the arrays if they are on one, with all over that was enqueued for them: MPI knows no streams."""
    for array in arrays:
        if not is_on_host(array):
            on_device: Any = array
            array_module(array).cuda.get_current_stream().synchronize()
            return on_device.device
    return None


class _Translated:
    """Turns an error of MPI's that is raised inside into one of ours."""

    def __init__(self, as_ours: Callable[[MPI.Exception], TransportError]) -> None:
        self._as_ours = as_ours

    def __enter__(self) -> None:
        return

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, MPI.Exception):
            raise self._as_ours(error) from error
