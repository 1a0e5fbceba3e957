"""The engine's collectives between virtual ranks: computed in the order of ranks, taking the time of a model."""

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


class _Gathering(Wait):
    """One collective: the ranks that have come to it, and the arrays they brought.

    Attributes:
        lost: why it will never be complete, once that is known.
        spoilt: ranks that are told of a death instead of the result.
    """

    def __init__(self, number: int, members: Sequence[Task]) -> None:
        self.number = number
        self._members = members
        self.come: dict[int, tuple[Task, Array, tuple[object, ...]]] = {}
        self.result = np.empty(0)
        self.lost: str | None = None
        self.spoilt: set[int] = set()

    def in_words(self) -> str:
        """As ``Wait.in_words``."""
        _, _, (operation, *_) = next(iter(self.come.values()))
        absent = [task for task in self._members if task.rank not in self.come]
        text = f"{ranks_in_words([task.rank for task in absent])} to join {operation}, collective number {self.number}"
        ended = [f"rank {task.rank} {task.ended}" for task in absent if task.ended is not None]
        return f"{text} ({', '.join(ended[:3])})" if ended else text


class Collectives:
    """All collectives among the same ranks: the k-th of each rank belong together.

    Of a rank that dies nothing is known here, and who waits for it waits forever, unless ``drop_non_finite`` is called.

    Args:
        scheduler: lets ranks wait for each other.
        wires: tell how long a collective takes.
        members: the ranks, in order.
        chance: of elastic ranks: decides who is told of a death, where real engines differ.
    """

    def __init__(
        self, scheduler: Scheduler, wires: Wires, members: Sequence[Task], chance: Random | None = None
    ) -> None:
        self._scheduler, self._wires, self._members, self._chance = scheduler, wires, members, chance
        self._joined: dict[int, int] = {}
        self._open: dict[int, _Gathering] = {}
        self._lost: dict[int, str] = {}
        self._ended: str | None = None

    def drop_non_finite(self, task: Task, why: str, time: float) -> None:
        """What needs a rank that is dead fails, and all that it has not joined."""
        self._lost[task.rank] = why
        for gathering in self._open.values():
            if task.rank not in gathering.come:
                self._doom(gathering, why, time)

    def end(self, why: str, time: float) -> None:
        """Everything fails, now and later."""
        self._ended = why
        for gathering in self._open.values():
            self._doom(gathering, why, time)

    def allreduce(self, task: Task, array: Array, op: ReduceOp) -> None:
        """Combine ``array`` over ranks, in its dtype, in the order of ranks."""
        gathering = self._join(task, "allreduce", array, op)
        if self._is_last(gathering):
            arrays = self._arrays(gathering)
            in_order = needs_order(array, op)
            terms = [to_ordered(other, op) for other in arrays] if in_order else arrays
            total = terms[0].copy()
            with np.errstate(all="ignore"):  # as an engine would
                for other in terms[1:]:
                    _COMBINE[op](total, other, out=total)
            for other in arrays:
                if in_order:
                    from_ordered(total, other)
                else:
                    np.copyto(other, total)
        self._leave(task, gathering)

    def broadcast(self, task: Task, array: Array, root: int) -> None:
        """Fill every rank's ``array`` with the root's. Engines let some go on that have no need of the dead."""
        gathering = self._join(task, "broadcast", array, root)
        source = self._members[root]
        if task is source:
            gathering.result = array.copy()
        try:
            self._leave(task, gathering)
        except RankLostError:
            if self._chance is None or self._ended is not None or source.rank not in gathering.come:
                raise
            others = [member.rank for member in self._members if not member.died and member is not source]
            if task.rank == max(others, default=task.rank) or self._chance.random() < 0.5:
                raise
        as_bytes(array)[...] = as_bytes(gathering.result)

    def allgather(self, task: Task, array: Array) -> Array:
        """The arrays of all ranks, stacked."""
        gathering = self._join(task, "allgather", array)
        if self._is_last(gathering):
            gathering.result = np.stack(self._arrays(gathering))
        self._leave(task, gathering)
        return gathering.result.copy()

    def barrier(self, task: Task) -> None:
        """Wait for all ranks."""
        self._leave(task, self._join(task, "barrier", np.empty(0)))

    def _join(self, task: Task, operation: str, array: Array, setting: object = None) -> _Gathering:
        self._scheduler.check_alive(task)
        if self._ended is not None:
            raise RankLostError(self._ended)
        number = self._joined.get(task.rank, 0)
        self._joined[task.rank] = number + 1
        gathering = self._open.setdefault(number, _Gathering(number, self._members))
        described = (operation, setting, array.dtype, array.shape)
        if gathering.come:
            first, (_, _, expected) = next(iter(gathering.come.items()))
            if described != expected:
                raise MismatchError(
                    f"collective number {number} is {_in_words(described)} on rank {task.rank}, but "
                    f"{_in_words(expected)} on rank {first}: all ranks must call the same collectives in the same order"
                )
        gathering.come[task.rank] = task, array, described
        for rank, why in self._lost.items():
            if rank not in gathering.come:
                self._doom(gathering, why, task.clock)
        return gathering

    def _is_last(self, gathering: _Gathering) -> bool:
        return len(gathering.come) == len(self._members)

    def _arrays(self, gathering: _Gathering) -> list[Array]:
        return [gathering.come[member.rank][1] for member in self._members]

    def _doom(self, gathering: _Gathering, why: str, time: float) -> None:
        if gathering.lost is None:
            gathering.lost = why
            for task, _, _ in gathering.come.values():
                if task.waiting is gathering:
                    self._scheduler.wake(task, time)

    def _leave(self, task: Task, gathering: _Gathering) -> None:
        if gathering.lost is None and self._is_last(gathering):
            self._finish(task, gathering)
        elif gathering.lost is None:
            self._scheduler.block(task, gathering)
        if gathering.lost is not None:
            raise RankLostError(gathering.lost)
        if task.rank in gathering.spoilt:
            raise RankLostError(f"a rank died in {gathering.come[task.rank][2][0]}, collective {gathering.number}")

    def _finish(self, task: Task, gathering: _Gathering) -> None:
        """All have come. Of one that has died since, some have got what it sent, and some have not."""
        del self._open[gathering.number]
        _, array, (operation, *_) = gathering.come[task.rank]
        # Ranks run in the order of their clocks, so the last to come is the latest.
        end = task.clock + self._wires.collective_seconds(str(operation), array.nbytes)
        if self._chance is not None and any(member.died for member in self._members):
            gathering.spoilt = {member.rank for member in self._members if self._chance.random() < 0.5}
        for other, _, _ in gathering.come.values():
            if other is not task:
                self._scheduler.wake(other, end)
        self._scheduler.advance(task, end)


def _in_words(described: tuple[object, ...]) -> str:
    operation, setting, dtype, shape = described
    if operation == "barrier":
        return "barrier"
    return f"{operation}{'' if setting is None else f' ({setting})'} of {dtype} {shape}"
