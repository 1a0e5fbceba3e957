"""The scheduler: resumes virtual ranks and runs events in the order of virtual time. It knows nothing of messages.

Events of the same moment run in this order: deaths, arrivals, resumed ranks (lowest first, then what they do in the
background), polling ranks. So the order is the same in every run.
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
    """Runs tasks, always the one whose clock is lowest, and events in between.

    Args:
        on_switch: called with the rank of a task before that task is resumed.
    """

    def __init__(self, on_switch: Callable[[int], None] | None = None) -> None:
        self.tasks: list[Task] = []
        self._background: list[Task] = []
        self._events: list[tuple[float, int, int, Any]] = []
        self._sequence = 0
        self._polling: list[Task] = []
        self._hub = getcurrent()
        self._on_switch = on_switch
        self._death_callbacks: list[Callable[[Task, float], None]] = []
        self._failure: tuple[Task, BaseException] | None = None
        self._is_over = False

    def add(self, work: Callable[[], Any]) -> Task:
        """Return a new task that runs ``work`` from time 0: a rank."""
        rank = len(self.tasks)
        task = Task(rank, rank, lambda: self._run_task(task, work), self._hub)
        self.tasks.append(task)
        heappush(self._events, (0.0, _RESUME, task.order, task))
        return task

    def add_background(self, program: Task, work: Callable[[], Any]) -> Task:
        """Return a new task of a rank that runs ``work`` from the present time on, until the rank dies.

        The simulation does not wait for its end. Called by the task that runs the rank's program.
        """
        order = len(self.tasks) + len(self._background)
        task = Task(program.rank, order, lambda: self._run_task(task, work), self._hub)
        self._background.append(task)
        heappush(self._events, (program.clock, _RESUME, task.order, task))
        return task

    def at(self, time: float, event: Callable[[float], None]) -> None:
        """Call ``event`` at ``time``, which is not in the past, before any rank that is resumed at that time."""
        self._sequence += 1
        heappush(self._events, (time, _ARRIVAL, self._sequence, event))

    def kill(self, task: Task, time: float) -> None:
        """End a task by a death at ``time``."""
        heappush(self._events, (time, _DEATH, task.order, task))

    def on_death(self, callback: Callable[[Task, float], None]) -> None:
        """Call ``callback`` with each task that dies and the time of its death."""
        self._death_callbacks.append(callback)

    def run(self) -> None:
        """Run until every task has ended.

        Raises:
            SimulationError: if a task raised an exception, which is the cause.
            DeadlockError: if tasks wait and no event is left.
        """
        try:
            self._run()
        finally:
            self._is_over = True
            for task in (*self.tasks, *self._background):
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
                self._kill_now(subject, time)
            elif subject.ended is None:
                subject.clock = time
                self._enter(subject)
                subject.greenlet.switch()
                if self._failure is not None:
                    self._raise_failure(*self._failure)
            # A polling task is resumed after an event. That another task polls is no event.
            if polling and kind != _POLL and not (events and events[0][0] <= time):
                for task in polling:
                    heappush(events, (max(time, task.clock), _POLL, task.order, task))
                polling.clear()
        if any(task.ended is None for task in self.tasks):
            raise deadlock(self.tasks)

    # The following methods are called by a task, on itself, while it runs.

    def advance(self, task: Task, until: float) -> None:
        """Advance the clock of the task to ``until``. Tasks whose clocks are lower run meanwhile."""
        self.check_alive(task)
        entry = (until, _RESUME, task.order, task)
        if self._events and self._events[0] < entry:
            heappush(self._events, entry)
            self._hub.switch()
        else:
            task.clock = until

    def block(self, task: Task, wait: Wait) -> None:
        """Suspend the task until ``wake`` is called."""
        self.check_alive(task)
        task.waiting, task.blocked = wait, True
        self._hub.switch()

    def poll(self, task: Task, wait: Wait) -> None:
        """Suspend the task until the next event of any rank, and advance its clock to that time."""
        self.check_alive(task)
        task.waiting = wait
        self._polling.append(task)
        self._hub.switch()
        task.waiting = None

    def wake(self, task: Task, time: float) -> None:
        """Resume a task at ``time``, which is not in the past, if it is blocked."""
        if not task.blocked:
            return
        task.waiting, task.blocked = None, False
        heappush(self._events, (time, _RESUME, task.order, task))

    def die(self, task: Task) -> NoReturn:
        """End the rank of the task, which is running, by a death now."""
        self._record_death(task, task.clock)
        raise GreenletExit

    def check_alive(self, task: Task) -> None:
        """End a task that still runs its ``finally`` blocks after its death or after the end of the simulation."""
        if self._is_over or task.ended is not None:
            raise GreenletExit

    def _enter(self, task: Task) -> None:
        if self._on_switch is not None:
            self._on_switch(task.rank)

    def _run_task(self, task: Task, work: Callable[[], Any]) -> None:
        try:
            task.result = work()
            task.ended = f"has ended at {task.clock:g} s"
        except GreenletExit:
            pass  # died, or the simulation is over
        except BaseException as error:  # noqa: BLE001 - the hub raises it
            if task.ended is None:
                self._failure = task, error

    def _kill_now(self, task: Task, time: float) -> None:
        if task.ended is None:
            self._record_death(task, time)
            self._enter(task)
            task.greenlet.throw(GreenletExit)

    def _record_death(self, dead: Task, time: float) -> None:
        """Note the death of a rank, one of whose tasks has died."""
        rank = self.tasks[dead.rank]
        for task in (rank, *(task for task in self._background if task.rank == dead.rank)):
            task.ended, task.died = f"died at {time:g} s", True
            task.waiting, task.blocked = None, False
        for callback in self._death_callbacks:
            callback(rank, time)

    def _raise_failure(self, task: Task, error: BaseException) -> NoReturn:
        if isinstance(error, KeyboardInterrupt):
            raise error
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        if isinstance(error, SimulationError):
            raise error
        raise SimulationError(f"rank {task.rank} failed at {task.clock:g} s: {what}") from error
