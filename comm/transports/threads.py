"""Ranks as threads of one process: for algorithms in a notebook, and for tests without a job."""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NoReturn, TypeVar, cast

import numpy as np

from lentando.comm.errors import TransportError
from lentando.comm.extremes import from_ordered, needs_order, to_ordered
from lentando.comm.transport import Array, Message, ReduceOp, Request, Traffic, check_rank
from lentando.comm.transports.mailbox import Mailbox, Receive

__all__ = ["ThreadTransport", "run_ranks"]

T = TypeVar("T")

_OPS = {"sum": np.add, "min": np.minimum, "max": np.maximum}


def run_ranks(size: int, function: Callable[["ThreadTransport"], T], *, timeout_seconds: float = 60.0) -> list[T]:
    """Call ``function`` once per rank, each in its own thread, and return the results by rank.

    An exception on one rank ends all ranks, and is raised in the caller.

    Args:
        size: number of ranks.
        function: function that each rank calls with its transport.
        timeout_seconds: limit for each wait for another rank, after which a ``TransportError`` is raised.

    Returns:
        results of ``function``, by rank.

    Example:
        >>> import numpy as np
        >>> from lentando.comm.testing import run_ranks
        >>> def worker(transport):
        ...     array = np.array([float(transport.rank)])
        ...     transport.allreduce(array)
        ...     return array.item()
        >>> run_ranks(4, worker)
        [6.0, 6.0, 6.0, 6.0]
    """
    world = _World(size, timeout_seconds)
    results: list[T | None] = [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = function(ThreadTransport(rank, world))
        except BaseException as error:  # noqa: BLE001 - raised again in the thread of the caller
            if hasattr(error, "add_note"):  # Python 3.11
                error.add_note(f"on rank {rank} of {size}")
            world.fail(error)

    threads = [threading.Thread(target=run, args=(rank,), name=f"rank {rank}", daemon=True) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if world.failure is not None:
        raise world.failure
    return results  # type: ignore[return-value]  # each rank has written its result


class ThreadTransport:
    """One rank of a job of threads. The thread that sends a message copies it into the array of the receiver.

    Args:
        rank: number of the rank.
        world: state that the ranks share.
    """

    name = "threads"

    def __init__(self, rank: int, world: "_World") -> None:
        self.rank = self.local_rank = rank
        self.size = self.local_size = world.size
        self.traffic = Traffic()
        self._world = world

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        for peer, _ in (*sends, *receives):
            check_rank(peer, self.size, "exchange with")
        with self._world.changed:
            posted = [Receive(array) for _, array in receives]
            for (peer, _), receive in zip(receives, posted, strict=True):
                self._world.mailbox(peer, self.rank, tag).post(receive)
            for peer, array in sends:
                self._world.mailbox(self.rank, peer, tag).send(array)
                self.traffic.messages += 1
                self.traffic.bytes_sent += array.nbytes
            self._world.changed.notify_all()
        return _ThreadExchange(self._world, posted)

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        in_order = needs_order(array, op)
        by_rank = self._world.meet(self.rank, to_ordered(array, op) if in_order else array.copy())
        with np.errstate(over="ignore", invalid="ignore"):  # MPI does not warn of overflow either
            combined = reduce(_OPS[op], by_rank)
        if in_order:
            from_ordered(combined, array)
        else:
            array[...] = combined
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def broadcast(self, array: Array, root: int = 0) -> None:
        check_rank(root, self.size, "broadcast from")
        array[...] = self._world.meet(self.rank, array.copy() if self.rank == root else None)[root]
        self.traffic.count_collective(array.nbytes if self.rank == root and self.size > 1 else 0)

    def allgather(self, array: Array) -> Array:
        gathered = np.stack(self._world.meet(self.rank, array.copy()))
        self.traffic.count_collective(array.nbytes * (self.size - 1))
        return gathered

    def barrier(self) -> None:
        self._world.meet(self.rank, None)
        self.traffic.count_collective(0)

    def for_ranks(self, ranks: Sequence[int]) -> "ThreadTransport | None":
        world = self._world.share(self.rank, ranks[0], len(ranks))
        if self.rank not in ranks:
            return None
        return ThreadTransport(ranks.index(self.rank), world)

    def for_thread(self) -> "ThreadTransport":
        return ThreadTransport(self.rank, self._world.share(self.rank, 0, self.size))

    def open_side_channel(self) -> bool:
        return True

    def send_nowait(self, peer: int, content: bytes) -> None:
        self._world.short_messages[peer].append((self.rank, content))

    def receive_nowait(self) -> tuple[int, bytes] | None:
        messages = self._world.short_messages[self.rank]
        return messages.popleft() if messages else None

    def has_sent_all(self) -> bool:
        return True

    def leave_notice(self, peer: int, number: int) -> None:
        with self._world.changed:
            self._world.notices[self.rank, peer].append(number)
            self._world.changed.notify_all()

    def read_notice(self, peer: int) -> int | None:
        with self._world.changed:
            notices = self._world.notices[peer, self.rank]
            return notices.popleft() if notices else None

    def take_notice(self, peer: int) -> int:
        notices = self._world.notices[peer, self.rank]
        with self._world.changed:
            if not self._world.changed.wait_for(lambda: notices, self._world.timeout_seconds):
                self._world.give_up("a notice")
            return notices.popleft()

    def clock(self) -> float:
        return time.perf_counter()

    def abort(self, status: int = 1) -> NoReturn:
        self._world.fail(TransportError(f"rank {self.rank} ended the job with status {status}"))
        raise SystemExit(status)

    def close(self) -> None:
        return


class _World:
    """The state that the threads share.

    Args:
        size: number of ranks.
        timeout_seconds: limit for each wait for another rank.
        parent: state of all ranks of the job, if these are a subset of them.
    """

    def __init__(self, size: int, timeout_seconds: float, parent: "_World | None" = None) -> None:
        self.size = size
        self.timeout_seconds = timeout_seconds
        self.changed = threading.Condition()
        self.short_messages: list[deque[tuple[int, bytes]]] = [deque() for _ in range(size)]
        self.notices: defaultdict[tuple[int, int], deque[int]] = defaultdict(deque)
        self._end: _End = _End() if parent is None else parent._end  # noqa: SLF001 - of the same class
        self._mailboxes: defaultdict[tuple[int, int, int], Mailbox] = defaultdict(Mailbox)
        self._contributions: list[Array | None] = [None] * size
        self._gate = threading.Barrier(size, timeout=timeout_seconds)
        self._end.worlds.append(self)

    @property
    def failure(self) -> BaseException | None:
        """The first error of any rank of the job."""
        return self._end.failure

    def mailbox(self, source: int, destination: int, tag: int) -> Mailbox:
        return self._mailboxes[source, destination, tag]

    def meet(self, rank: int, contribution: Array | None) -> list[Array]:
        """Wait for all ranks, and return their contributions, by rank."""
        self._contributions[rank] = contribution
        try:
            self._gate.wait()
            by_rank: list[Array] = list(self._contributions)  # type: ignore[arg-type]  # callers do not use a None
            self._gate.wait()  # no rank overwrites its contribution before all have read it
        except threading.BrokenBarrierError:
            self.give_up("a collective operation")
        return by_rank

    def share(self, rank: int, creator: int, size: int) -> "_World":
        """Create the state of a subset on one rank, and return it on all ranks."""
        created = _World(size, self.timeout_seconds, self) if rank == creator else None
        by_rank: list[Any] = self.meet(rank, cast(Any, created))
        shared: _World = by_rank[creator]
        return shared

    def give_up(self, waiting_for: str) -> NoReturn:
        if self.failure is not None:
            raise TransportError("another rank has failed") from self.failure
        raise TransportError(f"waited {self.timeout_seconds} s for {waiting_for}")

    def fail(self, error: BaseException) -> None:
        """End the waits of all ranks of the job, those in subsets included."""
        self._end.failure = self._end.failure or error
        for world in self._end.worlds:
            world.wake()

    def wake(self) -> None:
        """Let all ranks that wait find the failure."""
        with self.changed:
            self.changed.notify_all()
        self._gate.abort()


class _End:
    """The end of a job by an error, which ends the waits in all of its subsets.

    Attributes:
        failure: the first error of any rank.
        worlds: states of all ranks and of subsets.
    """

    def __init__(self) -> None:
        self.failure: BaseException | None = None
        self.worlds: list[_World] = []


class _ThreadExchange:
    """Receives that are posted. Sends are complete at once, because messages are copied."""

    def __init__(self, world: _World, receives: list[Receive]) -> None:
        self._world = world
        self._receives = receives
        self._waited_seconds = 0.0

    def wait(self) -> None:
        while not self.wait_for(self._world.timeout_seconds):
            pass

    def wait_for(self, seconds: float) -> bool:
        if self._waited_seconds >= self._world.timeout_seconds:
            self._world.give_up("a message")
        with self._world.changed:
            if self._world.changed.wait_for(self.test, seconds):
                return True
        self._waited_seconds += seconds
        return False

    def test(self) -> bool:
        complete = all(receive.is_filled for receive in self._receives)
        if not complete and self._world.failure is not None:
            self._world.give_up("a message")
        return complete
