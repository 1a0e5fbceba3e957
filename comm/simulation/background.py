"""What a virtual rank does in the background, while its program continues: with a clock of its own."""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any, Generic, Protocol, TypeVar

from greenlet import GreenletExit  # type: ignore[import-untyped, unused-ignore]

from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.tasks import Task, Wait
from lentando.comm.transport import Traffic, Transport

__all__ = ["BackgroundTask"]

T = TypeVar("T")


class _Bound(Transport, Protocol):
    """A transport that belongs to a task."""

    def bind(self, task: Task) -> None: ...


class _Idle(Wait):
    """The wait for work, when there is nothing to do in the background."""

    def describe(self) -> str:
        return "work in the background"


class _Work(Wait, Generic[T]):
    """A function that is called in the background, and its result: an ``Outcome``."""

    def __init__(self, scheduler: Scheduler, program: Task, background: Task, function: Callable[[], T]) -> None:
        self._scheduler, self._program, self._background = scheduler, program, background
        self._function = function
        self._results: list[T] = []
        self._error: BaseException | None = None

    def describe(self) -> str:
        waiting = self._background.waiting
        return f"its own background{'' if waiting is None else f', which waits for {waiting.describe()}'}"

    def run(self) -> None:
        """Call the function, and resume the program if it waits."""
        try:
            self._results.append(self._function())
        except GreenletExit:
            raise  # the rank has died, or the simulation is over
        except BaseException as error:  # noqa: BLE001 - it is raised again, in the program that waits
            self._error = error
        if self._program.waiting is self:
            self._scheduler.wake(self._program, self._background.clock)

    def done(self) -> bool:
        return bool(self._results) or self._error is not None

    def exception(self) -> BaseException | None:
        if not self.done():
            self._scheduler.block(self._program, self)
        return self._error

    def result(self) -> T:
        error = self.exception()
        if error is not None:
            raise error
        return self._results[0]


class BackgroundTask:
    """Calls functions one after the other while the program of a virtual rank continues. Implements ``BackgroundWork``.

    A function begins at the virtual time at which it is given, or when the one before has ended, and takes as long as
    its own messages and collectives do. These share the links with those of the program.

    Args:
        scheduler: scheduler of the simulation.
        program: task of the rank's program.
        transport: transport of the same ranks, for the background alone.
    """

    def __init__(self, scheduler: Scheduler, program: Task, transport: _Bound) -> None:
        self.transports: Sequence[Transport] = [transport]
        self._scheduler, self._program, self._transport = scheduler, program, transport
        self._queue: deque[_Work[Any]] = deque()
        self._task = scheduler.add_background(program, self._run)

    def submit(self, thread: int, work: Callable[[], T]) -> _Work[T]:
        """Let the background call a function, after those that it was given before. ``thread`` is 0."""
        given = _Work(self._scheduler, self._program, self._task, work)
        self._queue.append(given)
        if isinstance(self._task.waiting, _Idle):
            self._scheduler.wake(self._task, self._program.clock)
        return given

    def count_traffic(self, traffic: Traffic) -> None:
        """Move what the background has sent to other counters. Call it while no work is in progress."""
        traffic.take_over(self._transport.traffic)

    def _run(self) -> None:
        while True:
            while not self._queue:
                self._scheduler.block(self._task, _Idle())
            self._transport.bind(self._task)
            self._queue.popleft().run()
            self._transport.bind(self._program)  # which may plan reductions on it
