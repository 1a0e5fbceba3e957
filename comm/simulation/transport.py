"""The transport of a virtual rank."""

from collections.abc import Sequence
from copy import copy
from typing import NoReturn

from lentando.comm.errors import ConfigurationError, SimulationError, TransportError
from lentando.comm.simulation.background import BackgroundTask
from lentando.comm.simulation.collectives import Collectives
from lentando.comm.simulation.exchange import SimulatedExchange
from lentando.comm.simulation.faults import Pauses, RankFaults
from lentando.comm.simulation.messages import Mail
from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.step_times import StepTimes
from lentando.comm.simulation.tasks import Task
from lentando.comm.transport import Array, Message, ReduceOp, Traffic, check_rank

__all__ = ["SimulatedTransport"]


class SimulatedTransport:
    """The transport of one virtual rank, made by ``simulate``.

    Virtual time passes while the rank waits for messages or collectives, and in ``compute``, and nowhere else.

    Args:
        rank: number of the rank.
        size: number of ranks.
        local_size: number of ranks per node.
        scheduler: scheduler of the simulation.
        mail: messages and notices of all ranks.
        collectives: collectives of all ranks.
        times: durations of this rank's training steps.
        faults: faults of this rank.
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
        self._subsets = 0
        self._node_size = local_size
        self.local_rank = rank % local_size
        self.local_size = min(local_size, size - (rank - self.local_rank))
        self.traffic = Traffic()
        self._scheduler, self._mail, self._collectives, self._times = scheduler, mail, collectives, times
        self._faults = faults
        self._pauses = faults.pauses
        self._task: Task

    def bind(self, task: Task) -> None:
        """Set the task that runs this rank. Called once, before it runs."""
        self._task = task

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> SimulatedExchange:
        """Start an exchange, as ``Transport.exchange`` does.

        A send copies the array at once. A receive fills its array when the message arrives.

        Raises:
            TransportError: for a peer that does not exist.
            ConfigurationError: for a tag out of range, or an array that is not C-contiguous.
        """
        self._pause()
        sent_before_death = self._faults.messages_before_death(len(sends))
        request = self._start_exchange(sends if sent_before_death is None else sends[:sent_before_death], receives, tag)
        if sent_before_death is not None:
            self.die()
        traffic = self.traffic
        for _, array in sends:
            traffic.messages += 1
            traffic.bytes_sent += array.nbytes
        return request

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        """Combine ``array`` over all ranks, in place, in its dtype and in the order of ranks."""
        self._begin_collective()
        self._collectives.allreduce(self._task, _contiguous(array), op)
        self.traffic.count_collective(2 * array.nbytes * (self.size - 1) // self.size)

    def broadcast(self, array: Array, root: int = 0) -> None:
        """Fill every rank's ``array`` with the root's. All ranks, the root too, return at the same virtual time."""
        check_rank(root, self.size, "broadcast from")
        self._begin_collective()
        self._collectives.broadcast(self._task, _contiguous(array), root)
        self.traffic.count_collective(array.nbytes if self.rank == root and self.size > 1 else 0)

    def allgather(self, array: Array) -> Array:
        """Return the arrays of all ranks, stacked by rank."""
        self._begin_collective()
        gathered = self._collectives.allgather(self._task, _contiguous(array))
        self.traffic.count_collective(array.nbytes * (self.size - 1))
        return gathered

    def barrier(self) -> None:
        """Block until all ranks have called it."""
        self._begin_collective()
        self._collectives.barrier(self._task)
        self.traffic.count_collective(0)

    def for_ranks(self, ranks: Sequence[int]) -> "SimulatedTransport | None":
        """The transport of some of the ranks, as ``Subsets.for_ranks`` returns it."""
        self.barrier()
        self._subsets += 1
        return self._subset(ranks, self._pauses) if self.rank in ranks else None

    def start_background(self) -> BackgroundTask:
        """Background of this rank, as ``VirtualBackground.start_background`` returns it. Collective; takes no time."""
        self._subsets += 1
        transport = self._subset(range(self.size), copy(self._pauses))  # a pause stops program and background
        return BackgroundTask(self._scheduler, self._task, transport)

    def _subset(self, ranks: Sequence[int], pauses: Pauses) -> "_SubsetTransport":
        initial_ranks = [self._initial_rank(rank) for rank in ranks]
        transport = _SubsetTransport(
            ranks.index(self.rank),
            len(ranks),
            self._node_size,
            self._scheduler,
            self._mail.subset(initial_ranks, self._subsets),
            self._collectives.subset(ranks, self._subsets),
            self._times,
            self._faults,
        )
        transport.number(initial_ranks, self._task, pauses)
        return transport

    def leave_notice(self, peer: int, number: int) -> None:
        """Leave a number for another rank, which can read it at once."""
        self._mail.notices.leave(self._task, self._initial_rank(peer), number)

    def read_notice(self, peer: int) -> int | None:
        """Take the next number that another rank has left; None if there is none."""
        return self._mail.notices.read(self._task, self._initial_rank(peer))

    def take_notice(self, peer: int) -> int:
        """Take the next number that another rank has left.

        Raises:
            TransportError: if there is none.
        """
        number = self.read_notice(peer)
        if number is None:
            raise TransportError(f"rank {self.rank} takes a notice that rank {peer} has not left")
        return number

    def clock(self) -> float:
        """Return the virtual time since the simulation began, in seconds."""
        return self._task.clock

    def compute(self, seconds: float | None = None) -> None:
        """Advance the clock by the time that one training step takes.

        Optimizers call this once per step on transports that have it, which those of real ranks do not.

        Args:
            seconds: duration of the step; drawn from the compute model if None.

        Raises:
            ConfigurationError: if ``seconds`` is negative or not a number.
        """
        if seconds is None:
            seconds = self._times.next_seconds()
        elif not seconds >= 0:
            raise ConfigurationError(f"seconds must be >= 0, got {seconds}")
        self._pause()
        self._scheduler.advance(self._task, self._task.clock + seconds)

    def _initial_rank(self, peer: int) -> int:
        return peer

    def _start_exchange(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> SimulatedExchange:
        return self._mail.exchange(self._task, sends, receives, tag)

    def _begin_collective(self) -> None:
        self._pause()
        if self._faults.dies_in_collective():
            self._die_while_waiting()

    def _die_while_waiting(self) -> None:
        self._scheduler.kill(self._task, self._task.clock)

    def _pause(self) -> None:
        seconds = self._pauses.seconds(self._task.clock)
        if seconds:
            self._scheduler.advance(self._task, self._task.clock + seconds)

    def abort(self, status: int = 1) -> NoReturn:
        """End the simulation: ``simulate`` raises a ``SimulationError`` that names this rank and the status."""
        raise SimulationError(f"rank {self.rank} ended the job with status {status} at {self.clock():g} s")

    def die(self) -> NoReturn:
        """End this rank now, as a ``Death`` does."""
        self._scheduler.die(self._task)

    def close(self) -> None:
        """Do nothing: there is nothing to release, and ``init()`` may join the rank again."""


class _SubsetTransport(SimulatedTransport):
    """The transport of a virtual rank in a subset of the ranks. It shares the clock of the rank."""

    def number(self, initial_ranks: Sequence[int], task: Task, pauses: Pauses) -> None:
        """Set the numbers that the members had when the simulation began, the task and its pauses. Called once."""
        self.bind(task)
        self._pauses = pauses
        self._initial_ranks = initial_ranks
        node = task.rank // self._node_size
        on_node = [rank for rank in initial_ranks if rank // self._node_size == node]
        self.local_rank, self.local_size = on_node.index(task.rank), len(on_node)

    def _initial_rank(self, peer: int) -> int:
        check_rank(peer, self.size, "exchange with")
        return self._initial_ranks[peer]

    def _start_exchange(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> SimulatedExchange:
        outgoing, incoming = (
            [(self._initial_rank(peer), array) for peer, array in messages] for messages in (sends, receives)
        )
        return self._mail.exchange(self._task, outgoing, incoming, tag)


def _contiguous(array: Array) -> Array:
    if not array.flags.c_contiguous:
        raise ConfigurationError("a collective needs a C-contiguous array")
    return array
