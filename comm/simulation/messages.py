"""Messages between virtual ranks: matched by MPI's rules, and delivered at the time that the network model gives."""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import inf

from lentando.comm.cluster import Network
from lentando.comm.errors import ConfigurationError, TransportError
from lentando.comm.simulation.exchange import SimulatedExchange, format_bytes
from lentando.comm.simulation.faults import MessageFaults
from lentando.comm.simulation.notice_board import NoticeBoard
from lentando.comm.simulation.scheduler import Scheduler
from lentando.comm.simulation.tasks import Task
from lentando.comm.simulation.wires import Wires
from lentando.comm.transport import Array, Message, as_bytes

__all__ = ["Mail", "Sent"]

TAGS = 32768


@dataclass(frozen=True, slots=True)
class Sent:
    """A message, as the function ``observe`` of ``simulate`` receives it when the message is sent.

    Attributes:
        sender: rank that sends the message.
        receiver: rank that receives the message.
        tag: tag of the exchange.
        size_bytes: size of the message.
        sent_at_seconds: virtual time at which the message is sent.
        arrives_at_seconds: virtual time at which the message arrives, delays included; infinite if it is lost.
        copies: number of copies that arrive: 1, unless a fault changes it.
    """

    sender: int
    receiver: int
    tag: int
    size_bytes: int
    sent_at_seconds: float
    arrives_at_seconds: float
    copies: int


class _Channel:
    """Messages of one tag from one rank to another: receives without a message, or messages without a receive."""

    __slots__ = ("arrived", "last_arrival", "name", "receives")

    def __init__(self, sender: int, receiver: int, tag: int) -> None:
        self.name = (sender, receiver, tag)
        self.receives: deque[tuple[SimulatedExchange, Array]] = deque()
        self.arrived: deque[tuple[bytes, SimulatedExchange | None]] = deque()
        self.last_arrival = 0.0

    def add_message(self, data: bytes, sender: SimulatedExchange | None, time: float) -> None:
        """Match a message that arrives with the earliest receive, or keep it for the next receive."""
        if self.receives:
            receiver, array = self.receives.popleft()
            self._deliver(data, sender, receiver, array, time)
        else:
            self.arrived.append((data, sender))

    def add_receive(self, receiver: SimulatedExchange, array: Array, time: float) -> None:
        """Match a new receive with the earliest message that has arrived, or keep it for the next message."""
        if self.arrived:
            data, sender = self.arrived.popleft()
            self._deliver(data, sender, receiver, array, time)
        else:
            self.receives.append((receiver, array))

    def _deliver(
        self, data: bytes, sender: SimulatedExchange | None, receiver: SimulatedExchange, array: Array, time: float
    ) -> None:
        if receiver.failure is not None:
            pass  # the exchange has failed on its rank, which may use the array for something else
        elif len(data) == array.nbytes:
            as_bytes(array).data[:] = data
        else:
            rank, peer, tag = self.name
            receiver.error = TransportError(
                f"rank {peer} expects {format_bytes(array.nbytes)} from rank {rank} (tag {tag}), but the message has "
                f"{format_bytes(len(data))}: both must exchange arrays of the same size"
            )
        receiver.complete_one(time)
        if sender is not None:
            sender.unacknowledged.remove(self.name)
            sender.complete_one(time)


class Mail:
    """All messages and notices of a simulation.

    Args:
        scheduler: scheduler of the simulation.
        wires: network of the running simulation, which gives the times of arrival.
        network: network model, which says whether messages may overtake each other and are buffered.
        faults: message faults of the simulation.
        check_buffers: whether arrays in flight are checked for early reads and changes.
        observe: called with each message when it is sent.

    Attributes:
        notices: notices that have not been read.
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
        self.notices = NoticeBoard(scheduler)
        self._scheduler = scheduler
        self._wires, self._network, self._faults = wires, network, faults
        self._check_buffers, self._observe = check_buffers, observe
        self._channels: dict[tuple[int, int, int], _Channel] = {}
        self._watched: dict[SimulatedExchange, set[int]] = {}
        self._subsets: dict[tuple[int, ...], Mail] = {}

    def subset(self, ranks: Sequence[int], number: int) -> "Mail":
        """Messages among some of the ranks, which are not matched with others; the same object for all of them.

        Args:
            ranks: numbers of these ranks when the simulation began.
            number: a number that is equal on all ranks, and another for each subset.
        """
        mail = self._subsets.get((number, *ranks))
        if mail is None:
            mail = Mail(self._scheduler, self._wires, self._network, self._faults, self._check_buffers, self._observe)
            self._subsets[(number, *ranks)] = mail
        return mail

    def exchange(
        self, task: Task, sends: Sequence[Message], receives: Sequence[Message], tag: int
    ) -> SimulatedExchange:
        """Start an exchange of ``task``."""
        self._scheduler.check_alive(task)
        if not 0 <= tag < TAGS:
            raise ConfigurationError(f"tag must be between 0 and {TAGS - 1}, got {tag}")
        request = SimulatedExchange(task, self._scheduler, self.notices, self._describe_missing)
        for peer, array in receives:
            self._check(peer, array)
            if self._check_buffers:
                as_bytes(array).fill(0xFF)  # NaN in floating point: reads before the message has arrived show
            request.missing += 1
            self._channel(peer, task.rank, tag).add_receive(request, array, task.clock)
        for peer, array in sends:
            self._check(peer, array)
            self._send(request, peer, array, tag)
        return request

    def watch(self, request: SimulatedExchange, peers: set[int]) -> None:
        """Let ``fail_exchanges_with`` one of the ranks ``peers`` end this exchange."""
        if request.missing:
            self._watched = {other: ranks for other, ranks in self._watched.items() if other.is_pending}
            self._watched[request] = peers

    def fail_exchanges_with(self, task: Task, reason: str, time: float) -> None:
        """Let the watched exchanges with a rank that has died fail."""
        for request, peers in self._watched.items():
            if task.rank in peers:
                request.fail(reason, time)

    def fail_all(self, reason: str, time: float) -> None:
        """Let all watched exchanges fail, and discard all messages in flight and all notices."""
        for request in self._watched:
            request.fail(reason, time)
        self._watched, self._channels = {}, {}
        self.notices.clear()

    def _send(self, request: SimulatedExchange, peer: int, array: Array, tag: int) -> None:
        rank, now = request.task.rank, request.task.clock
        data = array.tobytes()
        left, arrival = self._wires.send(now, rank, peer, len(data))
        request.left_at = max(request.left_at, left)
        if self._check_buffers:
            request.sent.append((peer, array, data))
        copies = 1
        if self._faults:
            late_seconds, copies = self._faults.effect_on(now, rank, peer, tag)
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
            self._scheduler.at(arrival, lambda time: channel.add_message(data, acknowledged, time))
        for _ in range(1, copies):
            self._scheduler.at(arrival, lambda time: channel.add_message(data, None, time))
        if self._observe is not None:
            self._observe(Sent(rank, peer, tag, len(data), now, arrival if copies else inf, copies))

    def _channel(self, sender: int, receiver: int, tag: int) -> _Channel:
        key = (sender, receiver, tag)
        channel = self._channels.get(key)
        if channel is None:
            channel = self._channels[key] = _Channel(*key)
        return channel

    def _check(self, peer: int, array: Array) -> None:
        size = len(self._scheduler.tasks)
        if not 0 <= peer < size:
            raise TransportError(f"exchange with rank {peer}: expected a rank from 0 to {size - 1}")
        if not array.flags.c_contiguous:
            raise ConfigurationError(f"exchange with rank {peer}: expected a C-contiguous array")

    def _describe_missing(self, request: SimulatedExchange) -> str:
        """The messages that an exchange still waits for, and those that its rank has not received."""
        missing, unclaimed = [], []
        for (sender, receiver, tag), channel in self._channels.items():
            for waiting, array in channel.receives:
                if waiting is request:
                    state = self._scheduler.tasks[sender].ended
                    which = "" if state is None else f", which {state}"
                    missing.append(f"{format_bytes(array.nbytes)} from rank {sender} (tag {tag}){which}")
            if receiver == request.task.rank:
                unclaimed += [
                    f"{format_bytes(len(data))} from rank {sender} (tag {tag})" for data, _ in channel.arrived
                ]
        missing += [f"rank {receiver} to receive a message (tag {tag})" for _, receiver, tag in request.unacknowledged]
        text = " and ".join(missing)
        if unclaimed:
            text += f" (arrived, but expected by no receive: {', '.join(unclaimed[:3])})"
        return text
