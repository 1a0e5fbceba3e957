"""The engine's collectives between virtual ranks: computed in the order of ranks, taking the time of a model."""

import numpy as np

from lentando.comm.errors import MismatchError, ranks_in_words
from lentando.comm.simulation.network import Wires
from lentando.comm.simulation.scheduler import Scheduler, Task, Wait
from lentando.comm.transport import Array, ReduceOp, as_bytes

__all__ = ["Collectives"]

_COMBINE = {"sum": np.add, "min": np.minimum, "max": np.maximum}


class _Gathering(Wait):
    """One collective: the ranks that have come to it, and the arrays they brought."""

    def __init__(self, number: int, scheduler: Scheduler) -> None:
        self.number = number
        self._scheduler = scheduler
        self.come: dict[int, tuple[Task, Array, tuple[object, ...]]] = {}
        self.result = np.empty(0)

    def in_words(self) -> str:
        """As ``Wait.in_words``."""
        _, _, (operation, *_) = next(iter(self.come.values()))
        absent = [task for task in self._scheduler.tasks if task.rank not in self.come]
        text = f"{ranks_in_words([task.rank for task in absent])} to join {operation}, collective number {self.number}"
        ended = [f"rank {task.rank} {task.ended}" for task in absent if task.ended is not None]
        return f"{text} ({', '.join(ended[:3])})" if ended else text


class Collectives:
    """All collectives of a simulation: the k-th of each rank belong together.

    Args:
        scheduler: lets ranks wait for each other.
        wires: tell how long a collective takes.
    """

    def __init__(self, scheduler: Scheduler, wires: Wires) -> None:
        self._scheduler, self._wires = scheduler, wires
        self._joined: dict[int, int] = {}
        self._open: dict[int, _Gathering] = {}

    def allreduce(self, task: Task, array: Array, op: ReduceOp) -> None:
        """Combine ``array`` over ranks, in its dtype, in the order of ranks."""
        gathering = self._join(task, "allreduce", array, op)
        if self._is_last(gathering):
            arrays = self._arrays(gathering)
            total = arrays[0].copy()
            with np.errstate(all="ignore"):  # as an engine would
                for other in arrays[1:]:
                    _COMBINE[op](total, other, out=total)
            for other in arrays:
                np.copyto(other, total)
        self._leave(task, gathering)

    def broadcast(self, task: Task, array: Array, root: int) -> None:
        """Fill every rank's ``array`` with the root's."""
        gathering = self._join(task, "broadcast", array, root)
        if self._is_last(gathering):
            arrays = self._arrays(gathering)
            for other in arrays:
                as_bytes(other)[...] = as_bytes(arrays[root])
        self._leave(task, gathering)

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
        number = self._joined.get(task.rank, 0)
        self._joined[task.rank] = number + 1
        gathering = self._open.setdefault(number, _Gathering(number, self._scheduler))
        described = (operation, setting, array.dtype, array.shape)
        if gathering.come:
            first, (_, _, expected) = next(iter(gathering.come.items()))
            if described != expected:
                raise MismatchError(
                    f"collective number {number} is {_in_words(described)} on rank {task.rank}, but "
                    f"{_in_words(expected)} on rank {first}: all ranks must call the same collectives in the same order"
                )
        gathering.come[task.rank] = task, array, described
        return gathering

    def _is_last(self, gathering: _Gathering) -> bool:
        return len(gathering.come) == len(self._scheduler.tasks)

    def _arrays(self, gathering: _Gathering) -> list[Array]:
        return [gathering.come[rank][1] for rank in range(len(gathering.come))]

    def _leave(self, task: Task, gathering: _Gathering) -> None:
        if not self._is_last(gathering):
            self._scheduler.block(task, gathering)
            return
        del self._open[gathering.number]
        _, array, (operation, *_) = gathering.come[task.rank]
        # Ranks run in the order of their clocks, so the last to come is the latest.
        end = task.clock + self._wires.collective_seconds(str(operation), array.nbytes)
        for other, _, _ in gathering.come.values():
            if other is not task:
                self._scheduler.wake(other, end)
        self._scheduler.advance(task, end)


def _in_words(described: tuple[object, ...]) -> str:
    operation, setting, dtype, shape = described
    if operation == "barrier":
        return "barrier"
    return f"{operation}{'' if setting is None else f' ({setting})'} of {dtype} {shape}"
