"""Messages between virtual ranks: matched as MPI matches them, and there when the network model says."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from lentando.comm.cluster import Network
from lentando.comm.errors import ConfigurationError, RankLostError, TransportError
from lentando.comm.simulation.faults import MessageFaults
from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.tasks import Task, Wait
from lentando.comm.simulation.wires import Wires
from lentando.comm.transport import Array, Message, as_bytes

__all__ = ["Mail", "Sent", "SimulatedExchange"]

TAGS = 32768


@dataclass(frozen=True, slots=True)
class Sent:
    """A message, as an observer sees it when it is sent.

    Attributes:
        sender: rank.
        receiver: rank.
        tag: of the message.
        size_bytes: of the message.
        sent_at_seconds: when it was given to the network.
        arrives_at_seconds: when it is there, delays included; infinite if it is lost.
        copies: how many arrive: 1, or what a fault made of it.
    """

    sender: int
    receiver: int
    tag: int
    size_bytes: int
    sent_at_seconds: float
    arrives_at_seconds: float
    copies: int


class _Channel:
    """Messages of one tag from one rank to another: receives that wait for messages, or messages for receives."""

    __slots__ = ("arrived", "last_arrival", "name", "receives")

    def __init__(self, sender: int, receiver: int, tag: int) -> None:
        self.name = (sender, receiver, tag)
        self.receives: deque[tuple[SimulatedExchange, Array]] = deque()
        self.arrived: deque[tuple[bytes, SimulatedExchange | None]] = deque()
        self.last_arrival = 0.0

    def arrive(self, data: bytes, sender: "SimulatedExchange | None", time: float) -> None:
        """A message is there: the earliest receive takes it, or the next one to come."""
        if self.receives:
            receiver, array = self.receives.popleft()
            self._hand_over(data, sender, receiver, array, time)
        else:
            self.arrived.append((data, sender))

    def ask(self, receiver: "SimulatedExchange", array: Array, time: float) -> None:
        """A receive is there: the earliest message fills its array, or the next one to come."""
        if self.arrived:
            data, sender = self.arrived.popleft()
            self._hand_over(data, sender, receiver, array, time)
        else:
            self.receives.append((receiver, array))

    def _hand_over(
        self, data: bytes, sender: "SimulatedExchange | None", receiver: "SimulatedExchange", array: Array, time: float
    ) -> None:
        if receiver.lost is not None:
            pass  # its rank has been told that the exchange has failed, and may use the array for something else
        elif len(data) == array.nbytes:
            as_bytes(array).data[:] = data
        else:
            rank, peer, tag = self.name
            receiver.error = TransportError(
                f"rank {peer} expects {_bytes(array.nbytes)} from rank {rank} (tag {tag}), but the message has "
                f"{_bytes(len(data))}: both must exchange arrays of the same size"
            )
        receiver.one_less(time)
        if sender is not None:
            sender.unacknowledged.remove(self.name)
            sender.one_less(time)


class Mail:
    """All messages of a simulation.

    Args:
        scheduler: lets them arrive.
        wires: tell when.
        network: whether messages overtake and are buffered.
        faults: befall them.
        check_buffers: whether arrays under way are watched.
        observe: told of each message.
    """

    def __init__(
        self,
        scheduler: Scheduler,
        wires: Wires,
        network: Network,
        faults: MessageFaults,
        check_buffers: bool,
        observe: Callable[[Sent], None] | None,
    ) -> None:
        self.scheduler = scheduler
        self._wires, self._network, self._faults = wires, network, faults
        self._check_buffers, self._observe = check_buffers, observe
        self._channels: dict[tuple[int, int, int], _Channel] = {}
        self._notices: dict[tuple[int, int], deque[int]] = {}
        self._under_way: dict[SimulatedExchange, set[int]] = {}

    def watch(self, request: "SimulatedExchange", peers: set[int]) -> None:
        """Let an exchange with these ranks fail when one of them dies."""
        if request.missing:
            self._under_way = {other: ranks for other, ranks in self._under_way.items() if other.can_be_lost}
            self._under_way[request] = peers

    def drop_non_finite(self, task: Task, why: str, time: float) -> None:
        """The exchanges with a rank that is dead fail."""
        for request, peers in self._under_way.items():
            if task.rank in peers:
                request.drop_non_finite(why, time)

    def end(self, why: str, time: float) -> None:
        """Everything under way fails, and is gone."""
        for request in self._under_way:
            request.drop_non_finite(why, time)
        self._under_way, self._channels, self._notices = {}, {}, {}

    def leave_notice(self, task: Task, peer: int, number: int) -> None:
        """Let a rank read a number at once, also one that waits. Takes no time."""
        self._notices.setdefault((task.rank, peer), deque()).append(number)
        other = self.scheduler.tasks[peer]
        if isinstance(other.waiting, SimulatedExchange) and other.waiting.reads_notices:
            self.scheduler.wake(other, max(task.clock, other.clock))

    def read_notice(self, task: Task, peer: int) -> int | None:
        """The next number that another rank has left for this one, if there is one."""
        notices = self._notices.get((peer, task.rank))
        return notices.popleft() if notices else None

    def has_notice(self, task: Task) -> bool:
        """Whether any rank has left a number that this one has not read."""
        return any(receiver == task.rank and bool(left) for (_, receiver), left in self._notices.items())

    def exchange(
        self, task: Task, sends: Sequence[Message], receives: Sequence[Message], tag: int
    ) -> "SimulatedExchange":
        """Start an exchange of ``task``'s."""
        self.scheduler.check_alive(task)
        if not 0 <= tag < TAGS:
            raise ConfigurationError(f"tag must be between 0 and {TAGS - 1}, got {tag}")
        request = SimulatedExchange(self, task)
        for peer, array in receives:
            self._check(peer, array)
            if self._check_buffers:
                as_bytes(array).fill(0xFF)  # NaN in floating point: what is read before it has come shows
            request.missing += 1
            self._channel(peer, task.rank, tag).ask(request, array, task.clock)
        for peer, array in sends:
            self._check(peer, array)
            self._send(request, peer, array, tag)
        return request

    def _send(self, request: "SimulatedExchange", peer: int, array: Array, tag: int) -> None:
        rank, now = request.task.rank, request.task.clock
        data = array.tobytes()
        left, arrival = self._wires.send(now, rank, peer, len(data))
        request.left_at = max(request.left_at, left)
        if self._check_buffers:
            request.sent.append((peer, array, data))
        copies = 1
        if self._faults:
            late_seconds, copies = self._faults.befall(now, rank, peer, tag)
            arrival += late_seconds
        channel = self._channel(rank, peer, tag)
        if not self._network.reordering and copies:
            arrival = channel.last_arrival = max(arrival, channel.last_arrival)
        acknowledged: SimulatedExchange | None = None
        if not self._network.buffered:
            acknowledged = request
            request.missing += 1
            request.unacknowledged.append(channel.name)
        if copies:
            self.scheduler.at(arrival, lambda time: channel.arrive(data, acknowledged, time))
        for _ in range(1, copies):
            self.scheduler.at(arrival, lambda time: channel.arrive(data, None, time))
        if self._observe is not None:
            self._observe(Sent(rank, peer, tag, len(data), now, arrival if copies else inf, copies))

    def _channel(self, sender: int, receiver: int, tag: int) -> _Channel:
        key = (sender, receiver, tag)
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = _Channel(*key)
        return channel

    def _check(self, peer: int, array: Array) -> None:
        size = len(self.scheduler.tasks)
        if not 0 <= peer < size:
            raise TransportError(f"exchange with rank {peer}: expected a rank from 0 to {size - 1}")
        if not array.flags.c_contiguous:
            raise ConfigurationError(f"exchange with rank {peer}: expected a C-contiguous array")

    def missing_in_words(self, request: "SimulatedExchange") -> str:
        """What an exchange still waits for."""
        parts, unclaimed = [], []
        for (sender, receiver, tag), channel in self._channels.items():
            for waiting, array in channel.receives:
                if waiting is request:
                    state = self.scheduler.tasks[sender].ended
                    which = "" if state is None else f", which {state}"
                    parts.append(f"{_bytes(array.nbytes)} from rank {sender} (tag {tag}){which}")
            if receiver == request.task.rank:
                unclaimed += [f"{_bytes(len(data))} from rank {sender} (tag {tag})" for data, _ in channel.arrived]
        parts += [f"rank {receiver} to take a message (tag {tag})" for _, receiver, tag in request.unacknowledged]
        text = " and ".join(parts)
        if unclaimed:
            text += f" (there is {', '.join(unclaimed[:3])}, which no receive asks for)"
        return text


class SimulatedExchange(Wait):
    """Messages under way: complete when all receives are filled and all sends have left.

    Attributes:
        task: whose it is.
        missing: receives not filled, and sends not taken if those count.
        left_at: when the last send has left.
        sent: (receiver, array, its bytes when it was sent), to see whether it is left alone.
        unacknowledged: (sender, receiver, tag) of sends that have not been taken, if they must be.
        error: what became of a message that did not fit.
        lost: why it will never be complete.
        reads_notices: whether a notice ends the wait for it.
    """

    __slots__ = (
        "_mail", "_polled_at", "error", "left_at", "lost", "missing", "reads_notices", "sent", "task", "unacknowledged",
    )  # fmt: skip

    def __init__(self, mail: Mail, task: Task) -> None:
        self._mail, self.task = mail, task
        self.missing = 0
        self.left_at = task.clock
        self.sent: list[tuple[int, Array, bytes]] = []
        self.unacknowledged: list[tuple[int, int, int]] = []
        self.error: TransportError | None = None
        self.lost: str | None = None
        self.reads_notices = False
        self._polled_at = -1.0

    def wait(self) -> None:
        """Block until complete."""
        scheduler, task = self._mail.scheduler, self.task
        if self.missing and self.lost is None:
            scheduler.block(task, self)
        if self.left_at > task.clock and self.lost is None:
            scheduler.advance(task, self.left_at)
        self._finish()

    def wait_for(self, seconds: float) -> bool:
        """True once complete, False once there is a notice to read; however long either takes."""
        if self.missing and self.lost is None:
            if self._mail.has_notice(self.task):
                return False
            self.reads_notices = True
            self._mail.scheduler.block(self.task, self)
            self.reads_notices = False
            if self.missing and self.lost is None:
                return False
        self.wait()
        return True

    def test(self) -> bool:
        """True once complete. Asked again at the same moment, it lets time pass until something happens somewhere."""
        scheduler, task = self._mail.scheduler, self.task
        scheduler.check_alive(task)
        if self._polled_at == task.clock and not self.is_complete():
            if not self.missing:
                scheduler.at(self.left_at, lambda time: None)  # something that happens: the send has left
            scheduler.poll(task, self)
        self._polled_at = task.clock
        if not self.is_complete():
            return False
        self._finish()
        return True

    @property
    def can_be_lost(self) -> bool:
        """Whether it waits for other ranks."""
        return self.missing > 0 and self.lost is None

    def is_complete(self) -> bool:
        """Whether there is nothing to wait for."""
        return self.lost is not None or (not self.missing and self.left_at <= self.task.clock)

    def drop_non_finite(self, why: str, time: float) -> None:
        """It has failed, unless all that it waited for has come."""
        if self.can_be_lost:
            self.lost = why
            if self.task.waiting is self:
                self._mail.scheduler.wake(self.task, time)

    def one_less(self, time: float) -> None:
        """A receive has been filled, or a send taken."""
        self.missing -= 1
        if not self.missing and self.task.waiting is self:
            self._mail.scheduler.wake(self.task, time)

    def in_words(self) -> str:
        """As ``Wait.in_words``."""
        return self._mail.missing_in_words(self)

    def _finish(self) -> None:
        if self.lost is not None:
            raise RankLostError(self.lost)
        if self.error is not None:
            raise self.error
        for peer, array, data in self.sent:
            if array.tobytes() != data:
                raise TransportError(
                    f"rank {self.task.rank} changed an array of {_bytes(len(data))} while it was being sent to rank "
                    f"{peer}: wait until the exchange is complete, or send a copy"
                )
        self.sent.clear()


def _bytes(count: int) -> str:
    return "1 byte" if count == 1 else f"{count} bytes"
