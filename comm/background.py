"""Work in the background: threads that communicate while the main thread computes.

Each thread has a transport of its own, which connects the same ranks, and does its work in the order in which it was
given. Threads with the same number therefore exchange messages with each other only: all ranks give each of them the
same operations in the same order. The threads start with the first work. They end, and return their transports, when
the object that owns them is garbage: after the work that was given, because other ranks wait for it.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from threading import Thread
from typing import Any, Protocol, TypeAlias, TypeVar, runtime_checkable
from weakref import finalize

from lentando.comm.thread_transports import Loan, borrow_transports
from lentando.comm.transport import Traffic, Transport

__all__ = [
    "BackgroundThreads",
    "BackgroundWork",
    "Outcome",
    "VirtualBackground",
    "start_background_threads",
    "start_background_work",
]

T = TypeVar("T")
T_co = TypeVar("T_co", covariant=True)

_Work: TypeAlias = "tuple[Future[Any], Callable[[], Any]]"


class Outcome(Protocol[T_co]):
    """What a function in the background returns; a ``Future``, for example."""

    def done(self) -> bool:
        """Whether the function has ended."""

    def result(self) -> T_co:
        """Wait, and return what the function has returned, or raise its exception."""

    def exception(self) -> BaseException | None:
        """Wait, and return its exception, None if it has none."""


class BackgroundWork(Protocol):
    """Calls functions in the background; ``BackgroundThreads`` contains the descriptions."""

    @property
    def transports(self) -> Sequence[Transport]:
        """A transport for each thread."""

    def submit(self, thread: int, work: Callable[[], T]) -> Outcome[T]:
        """Let a thread call a function, after those that it was given before."""

    def count_traffic(self, traffic: Traffic) -> None:
        """Move what the threads have sent to other counters."""


@runtime_checkable
class VirtualBackground(Protocol):
    """A simulated transport whose rank can work in the background, in virtual time."""

    def start_background(self) -> BackgroundWork:
        """Background with one thread. Collective."""


class BackgroundThreads:
    """Threads that run functions, each in the order of its own queue.

    Args:
        loans: a transport for each thread; given back when this object is garbage and its threads have ended.
        name: name of the threads, for debuggers and profilers.

    Attributes:
        transports: transport of each thread. Between two calls of ``submit`` whose results have been waited for, the
            main thread may plan reductions on it.
    """

    def __init__(self, loans: Sequence[Loan], name: str) -> None:
        self.transports: Sequence[Transport] = [loan.transport for loan in loans]
        self._loans = loans
        self._name = name
        self._queues: list[SimpleQueue[_Work | None]] = []
        # At the end of the interpreter the threads must not end before the rank has left the job, which needs them.
        finalize(self, _end, loans, self._queues).atexit = False

    def __len__(self) -> int:
        return len(self._loans)

    def start(self) -> None:
        """Start the threads that have not been started, as the first work does.

        Raises:
            RuntimeError: if Python can start no thread, as Python 3.12 at the end of a program.
        """
        for loan in self._loans[len(self._queues) :]:
            queue: SimpleQueue[_Work | None] = SimpleQueue()
            Thread(target=_run, args=(queue, loan), name=self._name, daemon=True).start()
            self._queues.append(queue)  # now: if no thread can be started, no work may be given to it

    def submit(self, thread: int, work: Callable[[], T]) -> "Future[T]":
        """Let a thread call a function, after those that it was given before.

        Args:
            thread: number of the thread, from 0.
            work: function that communicates over this thread's transport only. It must not refer to this object, which
                would then never be garbage.

        Returns:
            A future. Its ``result()`` waits, and returns what the function has returned, or raises its exception.
        """
        self.start()
        future: Future[T] = Future()
        self._queues[thread].put((future, work))
        return future

    def count_traffic(self, traffic: Traffic) -> None:
        """Move what the threads have sent to other counters. Call it while no work is in progress.

        Args:
            traffic: counters of the job.
        """
        for transport in self.transports:
            traffic.take_over(transport.traffic)


def start_background_threads(transport: Transport, count: int, name: str) -> BackgroundThreads | None:
    """Background threads of a job, or None if its backend admits one thread only. Collective.

    Args:
        transport: transport of the job.
        count: number of threads.
        name: name of the threads.
    """
    loans = borrow_transports(transport, count)
    return BackgroundThreads(loans, name) if loans else None


def start_background_work(transport: Transport, name: str) -> BackgroundWork | None:
    """One background thread, which is a virtual one in a simulation. Arguments and result as in the function above."""
    if isinstance(transport, VirtualBackground):
        return transport.start_background()
    return start_background_threads(transport, 1, name)


def _run(queue: "SimpleQueue[_Work | None]", loan: Loan) -> None:
    """Do the work of a queue until it contains None, and give the transport back."""
    while (item := queue.get()) is not None:
        future, work = item
        try:
            future.set_result(work())
        except BaseException as error:  # noqa: BLE001 - it is raised again, in the thread that waits
            future.set_exception(error)
        del item, future, work  # which may hold the last reference to arrays of the user
    loan.give_back()


def _end(loans: Sequence[Loan], queues: "Sequence[SimpleQueue[_Work | None]]") -> None:
    for loan in loans[len(queues) :]:
        loan.give_back()
    for loan in loans[: len(queues)]:
        loan.is_ending = True
    for queue in queues:
        queue.put(None)
