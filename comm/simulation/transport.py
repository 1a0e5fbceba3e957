"""A simulated rank's transport."""

from collections.abc import Sequence
from typing import NoReturn

from lentando.comm.errors import ConfigurationError, SimulationError, TransportError
from lentando.comm.simulation.collectives import Collectives
from lentando.comm.simulation.faults import RankFaults
from lentando.comm.simulation.messages import Mail, SimulatedExchange
from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.step_times import StepTimes
from lentando.comm.simulation.tasks import Task
from lentando.comm.transport import Array, Message, ReduceOp, Traffic, check_rank

__all__ = ["SimulatedTransport"]


class SimulatedTransport:
    """The transport of one virtual rank; see ``simulate``.

    Time passes while the rank waits, for messages or collectives, and in ``compute``; everything else takes none.
    """

    name = "simulation"

    def __init__(
        self,
        rank: int,
        size: int,
        local_size: int,
        scheduler: Scheduler,
        mail: Mail,
        collectives: Collectives,
        times: StepTimes,
        faults: RankFaults,
    ) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = rank % local_size
        self.local_size = min(local_size, size - (rank - self.local_rank))
        self.traffic = Traffic()
        self._scheduler, self._mail, self._collectives, self._times = scheduler, mail, collectives, times
        self._faults = faults
        self._task: Task

    def sit_on(self, task: Task) -> None:
        """Say which task is this rank. Called once, before it runs."""
        self._task = task

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> SimulatedExchange:
        """As ``Transport.exchange``. A send takes the array's bytes at once; a receive fills its array on arrival.

        Raises:
            TransportError: for a peer that does not exist.
            ConfigurationError: for a tag that does not exist, or an array that is not contiguous.
        """
        self._pause()
        living = self._faults.messages_before_death(len(sends))
        request = self._post(sends if living is None else sends[:living], receives, tag)
        if living is not None:
            self.die()
        traffic = self.traffic
        for _, array in sends:
            traffic.messages += 1
            traffic.bytes_sent += array.nbytes
        return request

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        """As ``Transport.allreduce``: in the array's dtype, in the order of ranks."""
        self._begin_collective()
        self._collectives.allreduce(self._task, _contiguous(array), op)
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def broadcast(self, array: Array, root: int = 0) -> None:
        """As ``Transport.broadcast``. All ranks, the root too, go on when it is there."""
        check_rank(root, self.size, "broadcast from")
        self._begin_collective()
        self._collectives.broadcast(self._task, _contiguous(array), root)
        self.traffic.count_collective(array.nbytes if self.rank == root and self.size > 1 else 0)

    def allgather(self, array: Array) -> Array:
        """As ``Transport.allgather``."""
        self._begin_collective()
        gathered = self._collectives.allgather(self._task, _contiguous(array))
        self.traffic.count_collective(array.nbytes * (self.size - 1))
        return gathered

    def barrier(self) -> None:
        """As ``Transport.barrier``."""
        self._begin_collective()
        self._collectives.barrier(self._task)
        self.traffic.count_collective(0)

    def leave_notice(self, peer: int, number: int) -> None:
        """As ``Notices.leave_notice``. It is there at once."""
        self._mail.leave_notice(self._task, self._task_number(peer), number)

    def read_notice(self, peer: int) -> int | None:
        """As ``Notices.read_notice``."""
        return self._mail.read_notice(self._task, self._task_number(peer))

    def take_notice(self, peer: int) -> int:
        """As ``Notices.take_notice``, for a notice that is there.

        Raises:
            TransportError: if there is none.
        """
        number = self.read_notice(peer)
        if number is None:
            raise TransportError(f"rank {self.rank} takes a notice of rank {peer}, which has left none")
        return number

    def clock(self) -> float:
        """Virtual seconds since the simulation began."""
        return self._task.clock

    def compute(self, seconds: float | None = None) -> None:
        """Let the time of one training step pass: drawn from the compute model, or ``seconds``.

        Whoever counts training steps calls this once per step if the transport has it; those of real engines have
        not.

        Raises:
            ConfigurationError: if ``seconds`` is negative or not a number.
        """
        if seconds is None:
            seconds = self._times.next_seconds()
        elif not seconds >= 0:
            raise ConfigurationError(f"seconds must be >= 0, got {seconds}")
        self._pause()
        self._scheduler.advance(self._task, self._task.clock + seconds)

    def _task_number(self, peer: int) -> int:
        return peer

    def _post(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> SimulatedExchange:
        return self._mail.exchange(self._task, sends, receives, tag)

    def _begin_collective(self) -> None:
        self._pause()
        if self._faults.dies_in_collective():
            self._die_while_waiting()

    def _die_while_waiting(self) -> None:
        self._scheduler.kill(self._task, self._task.clock)

    def _pause(self) -> None:
        seconds = self._faults.pause_seconds(self._task.clock)
        if seconds:
            self._scheduler.advance(self._task, self._task.clock + seconds)

    def abort(self, status: int = 1) -> NoReturn:
        """End the simulation: ``simulate`` raises ``SimulationError`` with this rank and status."""
        raise SimulationError(f"rank {self.rank} ended the job with status {status} at {self.clock():g} s")

    def die(self) -> NoReturn:
        """Let this rank die now, as a ``Death`` would."""
        self._scheduler.die(self._task)

    def close(self) -> None:
        """Nothing to release: ``init()`` may join again."""


def _contiguous(array: Array) -> Array:
    if not array.flags.c_contiguous:
        raise ConfigurationError("a collective needs a C-contiguous array")
    return array
