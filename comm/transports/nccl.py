"""The transport over NCCL for arrays on GPUs. Another transport starts the job and carries arrays in host memory.

Tested with a substitute for NCCL that matches calls as NCCL does; never run on a GPU.

Each rank has one GPU: that of the first device array that it passes to a collective, in which the communicator is made.
All NCCL calls use one communicator and one stream, in the order in which the rank makes them. ``DeviceArrays`` explains
why this excludes deadlocks, and what is synchronised. NCCL connects two ranks at their first exchange, and blocks the
caller of ``exchange`` until both have called it.
"""

import threading
import time
from collections.abc import Callable, Sequence
from typing import NoReturn, cast

import numpy as np

from lentando.comm.array_module import array_module, is_on_host
from lentando.comm.capabilities import Notices, Subsets, TimedRequest
from lentando.comm.errors import (
    ConfigurationError,
    LaunchError,
    TransportError,
    grouped_by_rank,
    ranks_in_words,
    ranks_of,
)
from lentando.comm.extremes import from_ordered, needs_order, to_ordered
from lentando.comm.objects import allgather_object, broadcast_object
from lentando.comm.transport import Array, Message, ReduceOp, Request, Transport, as_bytes, check_rank
from lentando.comm.transports.nccl_binding import Binding, Communicator, NCCLBinding

__all__ = ["NCCLTransport"]

POLLS_BEFORE_SLEEP = 100
"""Number of polls before a waiting rank sleeps between polls, because most waits are short."""
POLL_SECONDS = 20e-6
ABORT_SECONDS = 5.0
"""How long a failed job waits for NCCL to release the GPU."""


class NCCLTransport:
    """Ranks that have a GPU each. Implements ``DeviceArrays`` and ``BackendReduceScatter``.

    Args:
        bootstrap: transport of the same ranks over MPI, for example. It is closed with this transport.
        binding: binding of NCCL; by default nccl4py.

    Raises:
        LaunchError: on every rank, if NCCL cannot be used on one of them.
    """

    name = "nccl"
    takes_device_arrays = True

    def __init__(self, bootstrap: Transport, binding: Binding | None = None) -> None:
        self._bootstrap = bootstrap
        self._binding = NCCLBinding() if binding is None else binding
        self.rank, self.size = bootstrap.rank, bootstrap.size
        self.local_rank, self.local_size = bootstrap.local_rank, bootstrap.local_size
        self.traffic = bootstrap.traffic  # counted together
        self._communicator: Communicator | None = None
        problems = allgather_object(bootstrap, self._binding.problem())
        if any(problems):
            by_rank = grouped_by_rank([problem or "nothing is missing" for problem in problems])
            raise LaunchError(
                f"NCCL cannot be used: {by_rank}. Without LENTANDO_TRANSPORT=nccl, models on a GPU are averaged over "
                f"{bootstrap.name!r}"
            )

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        sends_here, receives_here = _on_device(sends), _on_device(receives)
        if not sends_here and not receives_here:
            return self._bootstrap.exchange(sends, receives, tag, overlap=overlap)
        for peer, _ in (*sends_here, *receives_here):
            check_rank(peer, self.size, "exchange with")
        on_host: Request | None = None
        if len(sends_here) < len(sends) or len(receives_here) < len(receives):
            # Before NCCL, which may block this rank until its peers have called the same exchange.
            on_host = self._bootstrap.exchange(_on_host(sends), _on_host(receives), tag, overlap=overlap)
        communicator = self._opened(*(array for _, array in (*sends_here, *receives_here)))
        with communicator.group():
            for peer, array in receives_here:
                if array.size:  # empty messages need no call: both ranks know their length
                    communicator.receive(as_bytes(array), peer)
            for peer, array in sends_here:
                if array.size:
                    communicator.send(as_bytes(array), peer)
                self.traffic.messages += 1
                self.traffic.bytes_sent += array.nbytes
        return _NCCLExchange(self.rank, communicator, [*sends, *receives], on_host)

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        if is_on_host(array):
            self._bootstrap.allreduce(array, op)
            return
        if needs_order(array, op):
            ordered = to_ordered(array, op)
            self._run(lambda communicator: communicator.allreduce(ordered, op), ordered)
            from_ordered(ordered, array)
        else:
            self._run(lambda communicator: communicator.allreduce(array, op), array)
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def broadcast(self, array: Array, root: int = 0) -> None:
        if is_on_host(array):
            self._bootstrap.broadcast(array, root)
            return
        check_rank(root, self.size, "broadcast from")
        self._run(lambda communicator: communicator.broadcast(as_bytes(array), root), array)
        self.traffic.count_collective(array.nbytes if self.rank == root and self.size > 1 else 0)

    def allgather(self, array: Array) -> Array:
        if is_on_host(array):
            return self._bootstrap.allgather(array)
        gathered: Array = array_module(array).empty((self.size, *array.shape), array.dtype)
        self.allgather_into(array, gathered)
        return gathered

    def reduce_scatter(self, array: Array, out: Array) -> None:
        self._run(lambda communicator: communicator.reduce_scatter(array, out), array, out)
        self.traffic.count_collective(array.nbytes * (self.size - 1) // self.size)

    def allgather_into(self, part: Array, out: Array) -> None:
        self._run(lambda communicator: communicator.allgather(as_bytes(part), as_bytes(out)), part, out)
        self.traffic.count_collective(part.nbytes * (self.size - 1))

    def barrier(self) -> None:
        self._bootstrap.barrier()

    def for_ranks(self, ranks: Sequence[int]) -> Transport | None:
        if not isinstance(self._bootstrap, Subsets):
            raise ConfigurationError(f"transport {self._bootstrap.name!r}, which NCCL uses here, has no process sets")
        members = self._bootstrap.for_ranks(ranks)
        return None if members is None else NCCLTransport(members, self._binding)

    def leave_notice(self, peer: int, number: int) -> None:
        self._notices().leave_notice(peer, number)

    def read_notice(self, peer: int) -> int | None:
        return self._notices().read_notice(peer)

    def take_notice(self, peer: int) -> int:
        return self._notices().take_notice(peer)

    def _notices(self) -> Notices:
        assert isinstance(self._bootstrap, Notices)
        return self._bootstrap

    def clock(self) -> float:
        return self._bootstrap.clock()

    def abort(self, status: int = 1) -> NoReturn:
        if self._communicator is not None:
            # In another thread, so that the job ends even if NCCL blocks.
            aborting = threading.Thread(target=self._communicator.abort, daemon=True)
            aborting.start()
            aborting.join(ABORT_SECONDS)
        self._bootstrap.abort(status)

    def close(self) -> None:
        if self._communicator is not None:
            self._communicator.close()
            self._communicator = None
        self._bootstrap.close()

    def _run(self, operation: Callable[[Communicator], None], *arrays: Array) -> None:
        """Perform a collective, and wait for its end."""
        if self._communicator is None:
            self._communicator = self._open(arrays[0])
        communicator = self._opened(*arrays)
        if all(array.size for array in arrays):
            with communicator.group():
                operation(communicator)
            _NCCLExchange(self.rank, communicator, [], None).wait()

    def _opened(self, *arrays: Array) -> Communicator:
        if self._communicator is None:
            raise TransportError(
                "the first operation on arrays on a GPU must be a collective one, in which all ranks connect: "
                "broadcast the model"
            )
        for array in arrays:
            device = self._binding.device_of(array)
            if device != self._communicator.device:
                raise TransportError(
                    f"rank {self.rank} communicates for GPU {self._communicator.device}, which held its first array, "
                    f"and was given an array on GPU {device}: keep all models of a rank on one GPU"
                )
        return self._communicator

    def _open(self, array: Array) -> Communicator:
        """Connect the GPUs of all ranks. Collective."""
        device = self._binding.device_of(array)
        identities = self._bootstrap.allgather(np.frombuffer(self._binding.identity(device), np.uint8))
        by_identity = ranks_of((rank, identity.tobytes()) for rank, identity in enumerate(identities))
        shared = [ranks_in_words(ranks) for ranks in by_identity.values() if len(ranks) > 1]
        if shared:
            raise ConfigurationError(
                f"NCCL needs a GPU for every rank, but one is used by {'; another by '.join(shared)}. Choose it before "
                "the model is made (torch.cuda.set_device(lt.local_rank())), and start no more ranks on a node than it "
                "has GPUs; several ranks can share one over MPI, without LENTANDO_TRANSPORT=nccl"
            )
        created = np.frombuffer(self._binding.unique_id(), np.uint8) if self.rank == 0 else None
        unique_id = broadcast_object(self._bootstrap, created).tobytes()
        return self._binding.open(self.size, self.rank, unique_id, device)


class _NCCLExchange:
    """The work that has been enqueued so far, and the messages in host memory of the same exchange."""

    def __init__(
        self, rank: int, communicator: Communicator, messages: Sequence[Message], on_host: Request | None
    ) -> None:
        self._rank = rank
        self._communicator = communicator
        self._mark = communicator.mark()
        self._messages = messages  # NCCL keeps only addresses
        self._on_host = on_host
        self._done = False

    def wait(self) -> None:
        if self._on_host is not None:
            self._on_host.wait()
        polls = 0
        while not self._has_arrived():
            polls += 1
            if polls > POLLS_BEFORE_SLEEP:
                time.sleep(POLL_SECONDS)

    def wait_for(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        if self._on_host is not None and not cast(TimedRequest, self._on_host).wait_for(seconds):
            return False
        while not self._has_arrived():
            if time.monotonic() >= until:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def test(self) -> bool:
        arrived = self._has_arrived()
        return arrived and (self._on_host is None or self._on_host.test())

    def _has_arrived(self) -> bool:
        if not self._done:
            error = self._communicator.error()
            if error is not None:
                raise TransportError(f"NCCL failed on rank {self._rank}: {error}")
            self._done = self._mark.done
            if self._done:
                self._messages = []
        return self._done


def _on_device(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if not is_on_host(message[1])]


def _on_host(messages: Sequence[Message]) -> list[Message]:
    return [message for message in messages if is_on_host(message[1])]
