"""Who runs next: ranks as greenlets, events in the order of virtual time. Knows nothing of messages.

Events of the same moment happen in the order: deaths, arrivals, ranks that go on (by rank), ranks that poll. So the
order is the same in every run.
"""

from collections.abc import Callable
from heapq import heappop, heappush
from typing import Any, NoReturn

from greenlet import GreenletExit, getcurrent  # type: ignore[import-untyped, unused-ignore]

from lentando.comm.errors import SimulationError
from lentando.comm.simulation.report import deadlock
from lentando.comm.simulation.tasks import Task, Wait

__all__ = ["Scheduler"]

_DEATH, _ARRIVAL, _RESUME, _POLL = range(4)


class Scheduler:
    """Runs tasks, always the one whose clock is lowest, and lets events happen in between.

    Args:
        switched: called with the rank of a task before it goes on.
    """

    def __init__(self, switched: Callable[[int], None] | None = None) -> None:
        self.tasks: list[Task] = []
        self._events: list[tuple[float, int, int, Any]] = []
        self._sequence = 0
        self._polling: list[Task] = []
        self._hub = getcurrent()
        self._switched = switched
        self._mourners: list[Callable[[Task, float], None]] = []
        self._failure: tuple[Task, BaseException] | None = None
        self._over = False

    def add(self, work: Callable[[], Any]) -> Task:
        """A new task that does ``work`` from time 0 on."""
        task = Task(len(self.tasks), lambda: self._live(task, work))
        self.tasks.append(task)
        heappush(self._events, (0.0, _RESUME, task.rank, task))
        return task

    def at(self, time: float, happen: Callable[[float], None]) -> None:
        """Let something happen at ``time``, not before now, and before any rank that goes on at that time."""
        self._sequence += 1
        heappush(self._events, (time, _ARRIVAL, self._sequence, happen))

    def kill(self, task: Task, time: float) -> None:
        """Let a task die at ``time``."""
        heappush(self._events, (time, _DEATH, task.rank, task))

    def on_death(self, mourn: Callable[[Task, float], None]) -> None:
        """Have ``mourn`` called with each task that dies, and when."""
        self._mourners.append(mourn)

    def run(self) -> None:
        """Run until every task has ended.

        Raises:
            SimulationError: if one of them raised; its exception is the cause.
            DeadlockError: if some wait and nothing will ever happen.
        """
        try:
            self._run()
        finally:
            self._over = True
            for task in self.tasks:
                if not task.greenlet.dead:
                    self._enter(task)
                    task.greenlet.throw(GreenletExit)

    def _run(self) -> None:
        events, polling = self._events, self._polling
        while events:
            time, kind, _, subject = heappop(events)
            if kind == _ARRIVAL:
                subject(time)
            elif kind == _DEATH:
                self._die(subject, time)
            elif subject.ended is None:
                subject.clock = time
                self._enter(subject)
                subject.greenlet.switch()
                if self._failure is not None:
                    self._report_failure(*self._failure)
            # Who polls goes on when something has happened; another's polling is nothing.
            if polling and kind != _POLL and not (events and events[0][0] <= time):
                for task in polling:
                    heappush(events, (max(time, task.clock), _POLL, task.rank, task))
                polling.clear()
        if any(task.ended is None for task in self.tasks):
            raise deadlock(self.tasks)

    # What a task calls, on itself, while it runs.

    def advance(self, task: Task, until: float) -> None:
        """Let the task's clock go on to ``until``; others whose clock is lower run meanwhile."""
        self.check_alive(task)
        entry = (until, _RESUME, task.rank, task)
        if self._events and self._events[0] < entry:
            heappush(self._events, entry)
            self._hub.switch()
        else:
            task.clock = until

    def block(self, task: Task, wait: Wait) -> None:
        """Wait until somebody calls ``wake``."""
        self.check_alive(task)
        task.waiting, task.blocked = wait, True
        self._hub.switch()

    def poll(self, task: Task, wait: Wait) -> None:
        """Let the clock go on until something happens to anybody."""
        self.check_alive(task)
        task.waiting = wait
        self._polling.append(task)
        self._hub.switch()
        task.waiting = None

    def wake(self, task: Task, time: float) -> None:
        """Let a task go on at ``time``, not before now, if it is blocked."""
        if not task.blocked:
            return
        task.waiting, task.blocked = None, False
        heappush(self._events, (time, _RESUME, task.rank, task))

    def die(self, task: Task) -> NoReturn:
        """Let the task, which runs, die now."""
        self._bury(task, task.clock)
        raise GreenletExit

    def check_alive(self, task: Task) -> None:
        """End a task that still runs its ``finally`` blocks, but has died or whose simulation is over."""
        if self._over or task.ended is not None:
            raise GreenletExit

    def _enter(self, task: Task) -> None:
        if self._switched is not None:
            self._switched(task.rank)

    def _live(self, task: Task, work: Callable[[], Any]) -> None:
        try:
            task.result = work()
            task.ended = f"has ended at {task.clock:g} s"
        except GreenletExit:
            pass  # died, or the simulation is over
        except BaseException as error:  # noqa: BLE001 - the hub raises it
            if task.ended is None:
                self._failure = task, error

    def _die(self, task: Task, time: float) -> None:
        if task.ended is None:
            self._bury(task, time)
            self._enter(task)
            task.greenlet.throw(GreenletExit)

    def _bury(self, task: Task, time: float) -> None:
        task.ended, task.died = f"died at {time:g} s", True
        task.waiting, task.blocked = None, False
        for mourn in self._mourners:
            mourn(task, time)

    def _report_failure(self, task: Task, error: BaseException) -> NoReturn:
        if isinstance(error, KeyboardInterrupt):
            raise error
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, SimulationError):
            raise error
        raise SimulationError(f"rank {task.rank} failed at {task.clock:g} s: {what}") from error
