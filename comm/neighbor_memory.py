"""Messages between ranks of a node that stay where they are: the receiver reads them in the sender's memory.

A rank writes a message into a slot of memory that its neighbours can read, and then the number of the message into a
counter there. A neighbour waits for that number, uses the message, and writes its number into a counter of its own, for
which the sender waits before it writes to the slot again. Nothing is sent, and nothing is copied.

The counters are plain numbers in shared memory. They rely on a processor that lets all others see the writes of a core
in their order, as x86 does, once a locked instruction has let pending writes pass. On other processors there is no
``NeighborMemory``, and messages are sent.
"""

import os
import platform
import threading
import time
from collections.abc import Mapping, Sequence

import numpy as np

from lentando.comm.capabilities import SharedNode, TimedRequest
from lentando.comm.elastic import is_elastic
from lentando.comm.errors import TransportError
from lentando.comm.objects import allgather_object
from lentando.comm.shared_memory import export_handle, import_handle, shared_zeros
from lentando.comm.transport import Array, Request, Transport

__all__ = ["NeighborMemory", "open_neighbor_memory"]

KEEPS_ORDER = ("x86_64", "AMD64", "i686")
"""Processors, as ``platform.machine`` names them, on which writes are seen in their order."""
ALIGNMENT_BYTES = 64
SPINS = 200
"""Polls, a few microseconds apart, after which a rank that waits begins to sleep between two polls."""
PAUSE_SECONDS = 1e-4
LOOK_SECONDS = 0.25
"""A waiting rank looks each time this many seconds have passed whether the others still run."""

_pending_writes = threading.Lock()


class NeighborMemory:
    """Slots for messages of this rank, which the others of its node read, and slots of those.

    Args:
        same_node: the ranks of this node.
        rank: number of this rank.
        slots: number of slots of each rank.
        by_rank: memory of each rank of this node, this one included: counters, and behind them the slots.
        processes: process of each of the other ranks.

    Attributes:
        neighbors: the other ranks of this node.
        sending: requests that a waiting rank tests, so that they progress.
    """

    def __init__(
        self,
        same_node: Sequence[int],
        rank: int,
        slots: int,
        by_rank: Mapping[int, Array],
        processes: Mapping[int, int],
    ) -> None:
        self._rank = rank
        self._processes = processes
        self._rows = {other: 1 + place for place, other in enumerate(same_node)}
        shape = 1 + len(same_node), slots
        start = _counter_bytes(*shape)
        self._counters = {other: _counters(memory, shape) for other, memory in by_rank.items()}
        self._slots = {other: np.array_split(memory[start:], slots) for other, memory in by_rank.items()}
        self.neighbors = frozenset(processes)
        self.sending: list[Request] = []

    def slot(self, rank: int, number: int) -> Array:
        """Bytes of a slot of a rank."""
        return self._slots[rank][number]

    def publish(self, slot: int, number: int) -> None:
        """Let neighbours read what this rank has written to a slot.

        Args:
            slot: the slot.
            number: number of the message, larger than those before.
        """
        _finish_writing()
        self._counters[self._rank][0, slot] = number

    def release(self, rank: int, slot: int, number: int) -> None:
        """Let a neighbour write to its slot again: this rank has used the message of this number, or never will."""
        _finish_writing()
        self._counters[self._rank][self._rows[rank], slot] = number

    def published(self, ranks: Sequence[int], slot: int, number: int) -> TimedRequest:
        """Complete once these neighbours have published their messages of this number."""
        return self._counted(ranks, 0, slot, number)

    def released(self, ranks: Sequence[int], slot: int, number: int) -> TimedRequest:
        """Complete once these neighbours have released this rank's message of this number."""
        return self._counted(ranks, self._rows[self._rank], slot, number)

    def _counted(self, ranks: Sequence[int], row: int, slot: int, number: int) -> TimedRequest:
        counters = [(rank, self._processes[rank], self._counters[rank][row]) for rank in ranks]
        return _Counted(counters, slot, number, self.sending)


def open_neighbor_memory(transport: Transport, slots: int, slot_bytes: int) -> NeighborMemory | None:
    """Open memory for messages between the ranks of each node. Collective, if the transport is a ``SharedNode``.

    Args:
        transport: transport of the job.
        slots: number of slots, equal on all ranks.
        slot_bytes: size of each of this rank's slots.

    Returns:
        None, on all ranks alike, if a rank cannot read the memory of another rank of its node, no two ranks share a
        node, or the job is elastic, where neighbours may die.
    """
    if not isinstance(transport, SharedNode) or is_elastic(transport):
        return None
    same_node, counters = transport.same_node, (1 + len(transport.same_node), slots)
    slot_bytes += -slot_bytes % ALIGNMENT_BYTES
    own = shared_zeros(_counter_bytes(*counters) + slots * slot_bytes, np.dtype(np.uint8))
    keeps_order = platform.machine() in KEEPS_ORDER
    handle = export_handle(own) if keeps_order and len(same_node) > 1 else None
    offers = allgather_object(transport, [handle, own.nbytes, len(same_node)])
    memory = {transport.rank: own}
    for rank in same_node:
        handle, size_bytes, _ = offers[rank]
        if rank != transport.rank and handle is not None:
            opened = import_handle(handle, size_bytes, own.dtype)
            if opened is not None:
                memory[rank] = opened
    has_all = keeps_order and len(memory) == len(same_node)
    if not transport.allgather(np.array([has_all])).all() or all(count == 1 for _, _, count in offers):
        return None
    processes = {rank: offers[rank][0][0] for rank in memory if rank != transport.rank}
    return NeighborMemory(same_node, transport.rank, slots, memory, processes)


class _Counted:
    """A request that is complete once counters of other ranks have reached a number.

    Args:
        counters: rank, process and counters by slot of each of the others.
        slot: the slot.
        number: the number.
        sending: requests that are tested meanwhile.
    """

    def __init__(
        self, counters: Sequence[tuple[int, int, Array]], slot: int, number: int, sending: Sequence[Request]
    ) -> None:
        self._missing = list(counters)
        self._slot, self._number = slot, number
        self._sending = sending

    def test(self) -> bool:
        while self._missing and self._missing[-1][2][self._slot] >= self._number:
            self._missing.pop()
        return not self._missing

    def wait(self) -> None:
        while not self.wait_for(LOOK_SECONDS):
            pass

    def wait_for(self, seconds: float) -> bool:
        until = time.monotonic() + seconds
        polls = 0
        while not self.test():
            if time.monotonic() >= until:
                self._check_processes()
                return not self._missing
            for request in self._sending:
                request.test()
            polls += 1
            time.sleep(0 if polls < SPINS else PAUSE_SECONDS)  # lets other threads run in any case
        return True

    def _check_processes(self) -> None:
        """Check that the ranks this one waits for still run.

        Raises:
            TransportError: if one does not.
        """
        ended = [rank for rank, process, _ in self._missing if not _runs(process)]
        if ended and not self.test():  # the last it did may have been to write the number
            raise TransportError(
                f"the process of rank {ended[0]} has ended: this rank waits for a message of it, or for it to read one"
            )


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def _counter_bytes(*shape: int) -> int:
    size_bytes = 8 * int(np.prod(shape))
    return size_bytes + -size_bytes % ALIGNMENT_BYTES


def _counters(memory: Array, shape: tuple[int, int]) -> Array:
    return memory[: 8 * shape[0] * shape[1]].view(np.int64).reshape(shape)


def _finish_writing() -> None:
    """Let what this thread has written become visible to other processors: a lock is taken by a locked instruction."""
    with _pending_writes:
        pass
