"""Collectives between virtual ranks: computed in the order of ranks, with durations from the network model."""

from collections.abc import Sequence
from random import Random

import numpy as np

from lentando.comm.errors import MismatchError, RankLostError, ranks_in_words
from lentando.comm.extremes import from_ordered, needs_order, to_ordered
from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.tasks import Task, Wait
from lentando.comm.simulation.wires import Wires
from lentando.comm.transport import Array, ReduceOp, as_bytes

__all__ = ["Collectives"]

_COMBINE = {"sum": np.add, "min": np.minimum, "max": np.maximum}


class _Collective(Wait):
    """One collective operation: the ranks that have joined it, and their arrays.

    Attributes:
        joined: task, array and description of the call of each rank that has joined, by rank.
        failure: reason why the operation will never be complete; None if it can be.
        failed_ranks: ranks on which the operation raises an error although it is complete, because a rank has died.
    """

    def __init__(self, number: int, members: Sequence[Task]) -> None:
        self.number = number
        self._members = members
        self.joined: dict[int, tuple[Task, Array, tuple[object, ...]]] = {}
        self.result = np.empty(0)
        self.failure: str | None = None
        self.failed_ranks: set[int] = set()

    def describe(self) -> str:
        """Return the ranks that have not joined, and the operation."""
        _, _, (operation, *_) = next(iter(self.joined.values()))
        absent = [task for task in self._members if task.rank not in self.joined]
        text = f"{ranks_in_words([task.rank for task in absent])} to join {operation}, collective number {self.number}"
        ended = [f"rank {task.rank} {task.ended}" for task in absent if task.ended is not None]
        return f"{text} ({', '.join(ended[:3])})" if ended else text


class Collectives:
    """All collectives among the same ranks. The k-th calls of all ranks belong together.

    A rank that has died is waited for forever, unless ``fail_collectives_without`` is called.

    Args:
        scheduler: scheduler of the simulation.
        wires: network of the running simulation, which gives the durations.
        members: participating ranks, in order.
        chance: random generator of an elastic simulation. It decides which ranks get an error when one dies, which
            differs between MPI libraries.
    """

    def __init__(
        self, scheduler: Scheduler, wires: Wires, members: Sequence[Task], chance: Random | None = None
    ) -> None:
        self._scheduler, self._wires, self._members, self._chance = scheduler, wires, members, chance
        self._calls: dict[int, int] = {}
        self._open: dict[int, _Collective] = {}
        self._dead: dict[int, str] = {}
        self._ended: str | None = None
        self._subsets: dict[tuple[int, ...], Collectives] = {}

    def subset(self, ranks: Sequence[int], number: int) -> "Collectives":
        """The collectives among some of the members, the same object for all of them.

        Args:
            ranks: positions of these members.
            number: a number that is equal on all ranks, and another for each subset.
        """
        members = [self._members[rank] for rank in ranks]
        return self._subsets.setdefault((number, *ranks), Collectives(self._scheduler, self._wires, members))

    def fail_collectives_without(self, task: Task, reason: str, time: float) -> None:
        """Let all collectives fail that a rank has not joined before it died."""
        self._dead[task.rank] = reason
        for collective in self._open.values():
            if task.rank not in collective.joined:
                self._fail(collective, reason, time)

    def fail_all(self, reason: str, time: float) -> None:
        """Let all collectives fail, now and later."""
        self._ended = reason
        for collective in self._open.values():
            self._fail(collective, reason, time)

    def allreduce(self, task: Task, array: Array, op: ReduceOp) -> None:
        """Combine ``array`` over ranks, in place, in its dtype and in the order of ranks."""
        collective = self._join(task, "allreduce", array, op)
        if self._is_joined_by_all(collective):
            arrays = self._arrays(collective)
            in_order = needs_order(array, op)
            terms = [to_ordered(term, op) for term in arrays] if in_order else arrays
            total = terms[0].copy()
            with np.errstate(all="ignore"):  # MPI does not warn of overflow either
                for term in terms[1:]:
                    _COMBINE[op](total, term, out=total)
            for output in arrays:
                if in_order:
                    from_ordered(total, output)
                else:
                    np.copyto(output, total)
        self._leave(task, collective)

    def broadcast(self, task: Task, array: Array, root: int) -> None:
        """Fill every rank's ``array`` with the root's.

        If a rank other than the root dies, some of the others succeed, as with MPI.
        """
        collective = self._join(task, "broadcast", array, root)
        source = self._members[root]
        if task.rank == source.rank:
            collective.result = array.copy()
        try:
            self._leave(task, collective)
        except RankLostError:
            if self._chance is None or self._ended is not None or source.rank not in collective.joined:
                raise
            others = [member.rank for member in self._members if not member.died and member is not source]
            if task.rank == max(others, default=task.rank) or self._chance.random() < 0.5:
                raise
        as_bytes(array)[...] = as_bytes(collective.result)

    def allgather(self, task: Task, array: Array) -> Array:
        """Return the arrays of all ranks, stacked."""
        collective = self._join(task, "allgather", array)
        if self._is_joined_by_all(collective):
            collective.result = np.stack(self._arrays(collective))
        self._leave(task, collective)
        return collective.result.copy()

    def barrier(self, task: Task) -> None:
        """Block until all ranks have called it."""
        self._leave(task, self._join(task, "barrier", np.empty(0)))

    def _join(self, task: Task, operation: str, array: Array, setting: object = None) -> _Collective:
        self._scheduler.check_alive(task)
        if self._ended is not None:
            raise RankLostError(self._ended)
        number = self._calls.get(task.rank, 0)
        self._calls[task.rank] = number + 1
        collective = self._open.setdefault(number, _Collective(number, self._members))
        called = (operation, setting, array.dtype, array.shape)
        if collective.joined:
            first, (_, _, expected) = next(iter(collective.joined.items()))
            if called != expected:
                raise MismatchError(
                    f"collective number {number} is {_describe(called)} on rank {task.rank}, but "
                    f"{_describe(expected)} on rank {first}: all ranks must call the same collectives in the same order"
                )
        collective.joined[task.rank] = task, array, called
        for rank, reason in self._dead.items():
            if rank not in collective.joined:
                self._fail(collective, reason, task.clock)
        return collective

    def _is_joined_by_all(self, collective: _Collective) -> bool:
        return len(collective.joined) == len(self._members)

    def _arrays(self, collective: _Collective) -> list[Array]:
        return [collective.joined[member.rank][1] for member in self._members]

    def _fail(self, collective: _Collective, reason: str, time: float) -> None:
        if collective.failure is None:
            collective.failure = reason
            for task, _, _ in collective.joined.values():
                if task.waiting is collective:
                    self._scheduler.wake(task, time)

    def _leave(self, task: Task, collective: _Collective) -> None:
        if collective.failure is None and self._is_joined_by_all(collective):
            self._finish(task, collective)
        elif collective.failure is None:
            self._scheduler.block(task, collective)
        if collective.failure is not None:
            raise RankLostError(collective.failure)
        if task.rank in collective.failed_ranks:
            raise RankLostError(f"a rank died in {collective.joined[task.rank][2][0]}, collective {collective.number}")

    def _finish(self, task: Task, collective: _Collective) -> None:
        """Complete a collective that all have joined. If one has died since, some ranks get an error."""
        del self._open[collective.number]
        _, array, (operation, *_) = collective.joined[task.rank]
        # Ranks run in the order of their clocks, so the last to join has the latest clock.
        end = task.clock + self._wires.collective_seconds(str(operation), array.nbytes, len(self._members))
        if self._chance is not None and any(member.died for member in self._members):
            collective.failed_ranks = {member.rank for member in self._members if self._chance.random() < 0.5}
        for member, _, _ in collective.joined.values():
            if member is not task:
                self._scheduler.wake(member, end)
        self._scheduler.advance(task, end)


def _describe(called: tuple[object, ...]) -> str:
    operation, setting, dtype, shape = called
    if operation == "barrier":
        return "barrier"
    return f"{operation}{'' if setting is None else f' ({setting})'} of {dtype} {shape}"
