"""The transport over MPI through mpi4py, with any MPI library. It never closes a communicator of the user."""

import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import numpy as np
from mpi4py import MPI

from lentando.comm.array_module import array_module, is_on_host
from lentando.comm.closed import mark_closed
from lentando.comm.errors import TransportError
from lentando.comm.extremes import from_ordered, needs_order, to_ordered
from lentando.comm.forked import refuse_in_children
from lentando.comm.pieces import longest_elements, pieces
from lentando.comm.transport import Array, Message, ReduceOp, Request, Traffic, Transport, as_bytes
from lentando.comm.transports.mpi.device_memory import is_cuda_aware, synchronize
from lentando.comm.transports.mpi.exchange import (
    FIRST_PAUSE_SECONDS,
    POLL_SECONDS,
    MPIExchange,
    PollingRequest,
    ProgressThread,
)
from lentando.comm.transports.mpi.finalization import end_at_finalize, forget
from lentando.comm.transports.mpi.side_messages import SideMessages
from lentando.comm.transports.mpi.translated_errors import TranslatedErrors

__all__ = ["OPS", "BackgroundMPITransport", "MPITransport"]

OPS: dict[str, MPI.Op] = {"sum": MPI.SUM, "min": MPI.MIN, "max": MPI.MAX}

EAGER_BYTES = 64_000
"""Size in which larger messages are split on the network, so that Open MPI sends them eagerly over TCP.

A larger message waits for an acknowledgement of the receiver, which queues on the same connection behind the receiver's
own message: two ranks that send to each other then alternate, at half the speed of the link. MPICH does the same. Open
MPI's limit is 64 KiB, its header included.
"""


class MPITransport(SideMessages):
    """The ranks of an MPI communicator.

    The communicator is duplicated, so that messages of Lentando cannot be mixed up with those of the program.

    Args:
        comm: communicator of the participating ranks; by default ``MPI.COMM_WORLD``.

    Attributes:
        takes_device_arrays: whether MPI reads and writes the memory of GPUs on all ranks. Implements ``DeviceArrays``.
        yields_cpu: whether collectives poll and sleep instead of spinning in MPI, which would take a core from threads
            that communicate. Implements ``YieldsCPU``.
    """

    name = "mpi"
    takes_device_arrays: bool
    yields_cpu = False

    def __init__(self, comm: MPI.Intracomm | None = None) -> None:
        self._translated_errors = TranslatedErrors(self._translate)
        self.same_node: Sequence[int]
        ranks = (MPI.COMM_WORLD if comm is None else comm).Dup()
        self._node = ranks.Split_type(MPI.COMM_TYPE_SHARED)
        self._set_communicator(ranks, self._node.allgather(ranks.Get_rank()))
        cuda_aware = np.array([is_cuda_aware()], np.int32)
        self._comm.Allreduce(MPI.IN_PLACE, cuda_aware, MPI.MIN)  # all ranks must send from the same kind of memory
        self.takes_device_arrays = bool(cuda_aware[0])
        self.traffic = Traffic()
        self._progress = ProgressThread() if MPI.Query_thread() == MPI.THREAD_MULTIPLE else None
        self._others: list[MPITransport] = []
        super().__init__()
        refuse_in_children(self)
        end_at_finalize(self)

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        comm, traffic = self._comm, self.traffic
        pending: list[MPI.Request] = []
        request = MPIExchange(
            pending, synchronize(*(array for _, array in (*sends, *receives))), self._translate, self.rank
        )
        self._on_exchange(request)
        try:
            # Receives come first: a message whose receive is posted is not copied through a buffer of MPI.
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
            raise self._translate(error) from error
        if overlap and self._progress is not None:
            self._progress.submit(request)
        return request

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        if needs_order(array, op):  # MPI does not define the result for NaN
            ordered = to_ordered(array, op)
            self._reduce(ordered, op)
            from_ordered(ordered, array)
        elif op == "sum" and array.dtype.kind in "iu" and array.dtype.itemsize < 4:
            wide = array.astype(np.int32)  # sums of short integers in Open MPI saturate for some elements
            self._reduce(wide, op)
            array[...] = wide.astype(array.dtype)
        else:
            self._reduce(array, op)
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def _reduce(self, array: Array, op: ReduceOp) -> None:
        synchronize(array)
        for piece in pieces(array.reshape(-1)):
            self._complete(self._comm.Allreduce, self._comm.Iallreduce, MPI.IN_PLACE, piece, OPS[op])

    def broadcast(self, array: Array, root: int = 0) -> None:
        synchronize(array)
        for piece in pieces(as_bytes(array)):
            self._complete(self._comm.Bcast, self._comm.Ibcast, (piece, MPI.BYTE), root)
        self.traffic.count_collective(array.nbytes if self.rank == root and self.size > 1 else 0)

    def allgather(self, array: Array) -> Array:
        gathered: Array = array_module(array).empty((self.size, *array.shape), array.dtype)
        synchronize(array)
        content, by_rank = as_bytes(array), as_bytes(gathered).reshape(self.size, -1)
        longest, start = longest_elements(1, self.size), 0
        for piece in pieces(content, longest):
            is_whole = piece.size == content.size
            output = by_rank if is_whole else array_module(array).empty((self.size, piece.size), np.uint8)
            self._complete(self._comm.Allgather, self._comm.Iallgather, (piece, MPI.BYTE), (output, MPI.BYTE))
            if not is_whole:
                by_rank[:, start : start + piece.size] = output
            start += piece.size
        self.traffic.count_collective(array.nbytes * (self.size - 1))
        return gathered

    def barrier(self) -> None:
        self._complete(self._comm.Barrier, self._comm.Ibarrier)
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

    def for_thread(self) -> Transport | None:
        if MPI.Query_thread() != MPI.THREAD_MULTIPLE:
            return None
        self.yields_cpu = True
        self._others.append(BackgroundMPITransport(self._comm))
        return self._others[-1]

    def for_ranks(self, ranks: Sequence[int]) -> Transport | None:
        is_member = self.rank in ranks
        with self._translated_errors:
            members = self._comm.Split(0 if is_member else MPI.UNDEFINED, self.rank)
        if not is_member:
            return None
        with self._translated_errors:
            transport = SubsetMPITransport(MPI.Intracomm(members), self.abort)
            members.Free()
        return transport

    def for_members(self, ranks: Sequence[int], tag: int) -> "SubsetMPITransport":
        """A transport of some of the ranks, as ``for_ranks`` returns, but collective over these ranks only.

        Args:
            ranks: the members, numbered in this order, which is the same on all of them.
            tag: number that differs between calls that several threads of a rank make at the same time.
        """
        with self._translated_errors:
            everyone = self._comm.Get_group()
            group = everyone.Incl(list(ranks))
            members = self._comm.Create_group(group, tag)
            transport = SubsetMPITransport(members, self.abort)
            members.Free()
            group.Free()
            everyone.Free()
        return transport

    def longest_message(self, peer: int) -> int:
        """Limit of the bytes of one message to or from a peer; longer arrays are cut."""
        return min(longest_elements(1), self._piece_bytes[peer])

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
        forget(self)
        mark_closed(self)  # Open MPI would crash if it were given a communicator that was freed

    def end_with_mpi(self) -> None:
        """Make no more calls of MPI, which the program is about to end itself, and free nothing."""
        if self._progress is not None:
            self._progress.close()
        mark_closed(self)

    def _complete(self, spinning: Callable[..., object], starting: Callable[..., MPI.Request], *arguments: Any) -> None:
        """Complete a collective by the blocking call, which spins, or poll the non-blocking one (``yields_cpu``)."""
        with self._translated_errors:
            if not self.yields_cpu:
                spinning(*arguments)
                return
            request, pause = starting(*arguments), FIRST_PAUSE_SECONDS
            while not request.Test():
                self._pause(pause)
                pause = min(1.5 * pause, POLL_SECONDS)

    def _pause(self, seconds: float = POLL_SECONDS) -> None:
        """Sleep between two polls of a request."""
        time.sleep(seconds)

    def _set_communicator(self, comm: MPI.Intracomm, same_node: Sequence[int]) -> None:
        """Communicate over ``comm`` from now on. ``same_node`` are its ranks on this node."""
        comm.Set_errhandler(MPI.ERRORS_RETURN)  # so that mpi4py raises exceptions
        self._comm = comm
        self.rank, self.size = comm.Get_rank(), comm.Get_size()
        self.same_node = same_node
        self.local_rank, self.local_size = same_node.index(self.rank), len(same_node)
        self._piece_bytes = [sys.maxsize if peer in same_node else EAGER_BYTES for peer in range(self.size)]

    def _on_exchange(self, request: MPIExchange) -> None:
        """Called with each exchange before it starts, for subclasses that record them."""

    def _translate(self, error: MPI.Exception, statuses: Sequence[MPI.Status] = ()) -> TransportError:
        # For an error "in status", each request has a code of its own. Requests that never started are only pending.
        codes = [code for status in statuses if (code := status.Get_error()) not in (MPI.SUCCESS, MPI.ERR_PENDING)]
        return TransportError(f"MPI failed: {MPI.Get_error_string(codes[0]) if codes else error.Get_error_string()}")

    def _pieces(self, peer: int, array: Array) -> list[Array]:
        """Return the messages that carry an array to or from a peer."""
        memory, longest = as_bytes(array), longest_elements(1)
        # MPI's pipeline from a GPU needs long messages. MPI reports a peer that does not exist.
        if is_on_host(array) and 0 <= peer < self.size:
            longest = self.longest_message(peer)
        return [memory] if memory.size <= longest else list(pieces(memory, longest))


class SubsetMPITransport(MPITransport):
    """Some of the ranks of a job.

    Args:
        comm: communicator of these ranks.
        abort: ends the whole job.
    """

    def __init__(self, comm: MPI.Intracomm, abort: Callable[[int], NoReturn]) -> None:
        super().__init__(comm)
        self._abort_job = abort

    def abort(self, status: int = 1) -> NoReturn:
        self._abort_job(status)


class BackgroundMPITransport(MPITransport):
    """The same ranks on another communicator, for one thread that communicates while the main thread computes.

    MPI spins while it waits, which would take a core from the computation. This transport polls and sleeps. Implements
    ``Interruptible``.
    """

    closed = False
    yields_cpu = True
    while_waiting: Callable[[], None] | None = None

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        return PollingRequest(super().exchange(sends, receives, tag, overlap=overlap), self._pause)

    def _pause(self, seconds: float = POLL_SECONDS) -> None:
        if self.closed:
            raise TransportError("the transport was closed while a thread was communicating over it")
        if self.while_waiting is not None:
            self.while_waiting()
        else:
            super()._pause(seconds)

    def close(self) -> None:
        self.closed = True
        super().close()
