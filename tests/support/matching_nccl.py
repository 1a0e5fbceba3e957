"""Stands in for NCCL where there is no GPU: ranks that are threads, whose calls are matched as NCCL matches them.

Each rank's communicator has a stream: a thread that executes one group of calls after the other. A group is complete
when all of its messages have been taken and filled, and a collective operation when all ranks have come to it; until
then nothing behind it begins. So ranks that call in orders that do not fit wait for each other here as they would in
NCCL; but not forever: after ``timeout_seconds`` that is an error of the communicator's, which names the group.
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial, reduce
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
from device_arrays import DeviceArray

from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import TransportError
from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transport import ReduceOp
from lentando.comm.transports.nccl import NCCLTransport

T = TypeVar("T")

OPS: dict[str, Any] = {"sum": np.add, "min": np.minimum, "max": np.maximum}
REDUCED = {np.dtype(d) for d in ("f2", "f4", "f8", "i1", "u1", "i4", "u4", "i8", "u8", bfloat16)}


def run_ranks_on_devices(
    size: int,
    function: Callable[[NCCLTransport], T],
    *,
    timeout_seconds: float = 10.0,
    latency_seconds: float = 0.0,
    devices: Sequence[int] | None = None,
) -> list[T]:
    """Call ``function`` once per rank, with a transport over this NCCL, and return the results by rank.

    Args:
        size: number of ranks.
        function: what each rank does.
        timeout_seconds: after which a group that waits for others is a deadlock.
        latency_seconds: every group takes so long at least.
        devices: which device each rank's binding describes; one of its own by default.
    """
    nccl = MatchingNCCL(size, timeout_seconds, latency_seconds)

    def run(bootstrap: ThreadTransport) -> T:
        device = bootstrap.rank if devices is None else devices[bootstrap.rank]
        transport = NCCLTransport(bootstrap, MatchingBinding(nccl, device))
        try:
            return function(transport)
        finally:
            nccl.end_of(bootstrap.rank)

    return run_ranks(size, run, timeout_seconds=3 * timeout_seconds)


@dataclass
class Message:
    """Sent, and not yet taken."""

    memory: np.ndarray
    taken: bool = False


@dataclass
class Group:
    """Calls that progress together.

    Attributes:
        name: for messages.
        sends, receives: (peer, memory).
        collective: kind with its arguments, this rank's memory, and what is done with all ranks'.
    """

    name: str
    sends: list[tuple[int, np.ndarray]] = field(default_factory=list)
    receives: list[tuple[int, np.ndarray]] = field(default_factory=list)
    collective: tuple[Any, np.ndarray, Callable[[list[np.ndarray]], None]] | None = None
    done: bool = False


class MatchingNCCL:
    """What the ranks share."""

    def __init__(self, size: int, timeout_seconds: float, latency_seconds: float) -> None:
        self.size = size
        self.timeout_seconds = timeout_seconds
        self.latency_seconds = latency_seconds
        self.changed = threading.Condition()
        self.sent: defaultdict[tuple[int, int], deque[Message]] = defaultdict(deque)
        self.brought: defaultdict[int, dict[int, Any]] = defaultdict(dict)
        self.members: dict[int, MatchingCommunicator] = {}

    def end_of(self, rank: int) -> None:
        if rank in self.members:
            self.members[rank].end()


class MatchingBinding:
    """Implements ``Binding``."""

    missing: str | None = None

    def __init__(self, nccl: MatchingNCCL, device: int) -> None:
        self.nccl = nccl
        self.device = device

    def problem(self) -> str | None:
        return self.missing

    def unique_id(self) -> bytes:
        return bytes(range(128))

    def device_of(self, array: Any) -> int:
        return array.device.id

    def identity(self, device: int) -> bytes:
        return bytes(15) + bytes([self.device])

    def open(self, size: int, rank: int, unique_id: bytes, device: int) -> "MatchingCommunicator":
        assert unique_id == self.unique_id()
        communicator = MatchingCommunicator(self.nccl, rank, device)
        with self.nccl.changed:
            self.nccl.members[rank] = communicator
            self.nccl.changed.notify_all()
            assert self.nccl.changed.wait_for(lambda: len(self.nccl.members) == size, self.nccl.timeout_seconds)
        return communicator


class MatchingCommunicator:
    """Implements ``Communicator``."""

    def __init__(self, nccl: MatchingNCCL, rank: int, device: int) -> None:
        self.device = device
        self.failure: str | None = None
        self.closed = ""
        self._nccl, self._rank = nccl, rank
        self._collectives = 0
        self._groups = 0
        self._open: Group | None = None
        self._last: Group | None = None
        self._queue: SimpleQueue[Group | None] = SimpleQueue()
        threading.Thread(target=self._stream, name=f"stream of rank {rank}", daemon=True).start()

    @contextmanager
    def group(self) -> Iterator[None]:
        assert self._open is None
        self._open = Group(f"group {self._groups} of rank {self._rank}")
        self._groups += 1
        try:
            yield
        finally:
            self._last, self._open = self._open, None
            self._queue.put(self._last)

    def send(self, array: DeviceArray, peer: int) -> None:
        self._within.sends.append((peer, _bytes(array)))

    def receive(self, array: DeviceArray, peer: int) -> None:
        self._within.receives.append((peer, _bytes(array)))

    def allreduce(self, array: DeviceArray, op: ReduceOp) -> None:
        memory = array._memory

        def combine(everyones: list[np.ndarray]) -> None:
            memory[...] = reduce(OPS[op], everyones)

        self._collective(("allreduce", op, memory.size, _reduced(memory)), memory, combine)

    def broadcast(self, array: DeviceArray, root: int) -> None:
        memory = _bytes(array)

        def take(everyones: list[np.ndarray]) -> None:
            memory[...] = everyones[root]

        self._collective(("broadcast", root, memory.size), memory, take)

    def allgather(self, part: DeviceArray, out: DeviceArray) -> None:
        memory, gathered = _bytes(part), _bytes(out)
        assert gathered.size == self._nccl.size * memory.size

        def join(everyones: list[np.ndarray]) -> None:
            gathered[...] = np.concatenate(everyones)

        self._collective(("allgather", memory.size), memory, join)

    def reduce_scatter(self, array: DeviceArray, out: DeviceArray) -> None:
        memory, own = array._memory, out._memory
        assert memory.size == self._nccl.size * own.size
        assert memory.dtype == own.dtype

        def combine(everyones: list[np.ndarray]) -> None:
            start = own.size * self._rank
            own[...] = reduce(np.add, [memory[start : start + own.size] for memory in everyones])

        self._collective(("reduce_scatter", memory.size, _reduced(memory)), memory, combine)

    def mark(self) -> Group:
        assert self._last is not None
        return self._last

    def error(self) -> str | None:
        return self.failure

    def abort(self) -> None:
        self.closed = "aborted"
        self.end()

    def close(self) -> None:
        assert self._last is None or self._last.done
        self.closed = "closed"
        self.end()

    def end(self) -> None:
        self._queue.put(None)

    @property
    def _within(self) -> Group:
        if self._open is None:
            raise TransportError("a call of NCCL's outside any group")
        return self._open

    def _collective(self, kind: Any, memory: np.ndarray, action: Callable[[list[np.ndarray]], None]) -> None:
        self._within.collective = kind, memory, action

    def _stream(self) -> None:
        while (group := self._queue.get()) is not None:
            time.sleep(self._nccl.latency_seconds)
            try:
                with np.errstate(all="ignore"):
                    self._execute(group)
            except Exception as error:  # noqa: BLE001 - it is the communicator's asynchronous error
                self.failure = f"{group.name}: {error}"
                return
            group.done = True

    def _execute(self, group: Group) -> None:
        if group.collective is not None:
            self._meet(group)
        messages = [Message(memory) for _, memory in group.sends]
        with self._nccl.changed:
            for (peer, _), message in zip(group.sends, messages, strict=True):
                self._nccl.sent[self._rank, peer].append(message)
            self._nccl.changed.notify_all()
            expected = deque(group.receives)
            while expected:  # in any order between peers, in the order of the calls from one
                ready = next((r for r in expected if self._nccl.sent[r[0], self._rank]), None)
                if ready is None:
                    self._wait(partial(self._has_sent, [peer for peer, _ in expected]))
                    continue
                expected = deque(r for r in expected if r is not ready)
                message = self._nccl.sent[ready[0], self._rank].popleft()
                if message.memory.size != ready[1].size:
                    raise ValueError(f"{message.memory.size} bytes from rank {ready[0]} met {ready[1].size}")
                ready[1][...] = message.memory
                message.taken = True
                self._nccl.changed.notify_all()
            self._wait(lambda: all(message.taken for message in messages))

    def _has_sent(self, peers: Sequence[int]) -> bool:
        return any(self._nccl.sent[peer, self._rank] for peer in peers)

    def _meet(self, group: Group) -> None:
        assert group.collective is not None
        kind, memory, action = group.collective
        number, self._collectives = self._collectives, self._collectives + 1
        brought, size = self._nccl.brought[number], self._nccl.size
        with self._nccl.changed:
            brought[self._rank] = kind, memory.copy()
            self._nccl.changed.notify_all()
            self._wait(lambda: len(brought) == size)
            kinds = {kind for kind, _ in brought.values()}
            if len(kinds) > 1:
                raise ValueError(f"ranks call different operations: {kinds}")
            everyones = [brought[rank][1] for rank in range(size)]
        action(everyones)

    def _wait(self, condition: Callable[[], bool]) -> None:
        if not self._nccl.changed.wait_for(condition, self._nccl.timeout_seconds):
            raise TimeoutError(f"others have not come to it in {self._nccl.timeout_seconds} s: a deadlock")


def _bytes(array: DeviceArray) -> np.ndarray:
    assert array.flags.c_contiguous
    return array._memory.reshape(-1).view(np.uint8)


def _reduced(memory: np.ndarray) -> str:
    assert memory.dtype in REDUCED, f"NCCL sums no {memory.dtype}"
    return memory.dtype.name
