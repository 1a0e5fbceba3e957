"""The seam to what carries messages: a small protocol that MPI, a world of one, and others implement.

Arrays are C-contiguous NumPy arrays, and CuPy arrays where the transport takes them (``DeviceArrays``). A transport
moves and reduces bytes; it knows no model and no algorithm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lentando.comm.errors import TransportError

__all__ = [
    "Array",
    "BackendReduceScatter",
    "Background",
    "DeviceArrays",
    "Elastic",
    "Exchanges",
    "Message",
    "Notices",
    "ReduceOp",
    "Request",
    "SharedNode",
    "SideChannel",
    "TimedRequest",
    "Traffic",
    "Transport",
    "VirtualTime",
    "YieldsCPU",
    "as_bytes",
    "check_rank",
    "shares_memory",
    "takes_device_arrays",
    "yields_cpu",
]

Array: TypeAlias = NDArray[Any]
Message: TypeAlias = tuple[int, Array]
"""A peer's rank and the array that is sent to it or filled by it."""
ReduceOp: TypeAlias = Literal["sum", "min", "max"]


@dataclass
class Traffic:
    """What one rank has sent so far.

    Attributes:
        messages: point-to-point messages sent.
        collectives: collective operations of the engine itself that this rank took part in.
        bytes_sent: bytes of the messages, plus for each engine collective the bytes that a bandwidth-optimal
            algorithm sends per rank (all-reduce 2(n-1)/n of the array, all-gather n-1 times the array,
            broadcast one array from the root), because an engine does not tell.
    """

    messages: int = 0
    collectives: int = 0
    bytes_sent: int = 0

    def count_collective(self, bytes_sent: int) -> None:
        """One more that this rank has taken part in, and what it has sent for it."""
        self.collectives += 1
        self.bytes_sent += bytes_sent

    def take_over(self, other: "Traffic") -> None:
        """Count what another counter has counted, which begins anew."""
        self.messages += other.messages
        self.collectives += other.collectives
        self.bytes_sent += other.bytes_sent
        other.messages = other.collectives = other.bytes_sent = 0

    def copy(self) -> "Traffic":
        """A snapshot to subtract from later."""
        return Traffic(self.messages, self.collectives, self.bytes_sent)


class Request(Protocol):
    """An exchange under way. It keeps the arrays alive until it is complete."""

    def wait(self) -> None:
        """Block until every send may be overwritten and every receive is filled. Raises ``TransportError``."""

    def test(self) -> bool:
        """True once complete; never blocks."""


class TimedRequest(Request, Protocol):
    """A request that can be waited for with an end."""

    def wait_for(self, seconds: float) -> bool:
        """True once complete; False after about so many seconds, or as soon as there is a notice to read.

        Raises:
            TransportError: as ``wait``.
        """


class Exchanges(Protocol):
    """What a ring needs of a transport: some ranks that exchange messages.

    Attributes:
        rank, size: as a ``Transport``'s.
    """

    rank: int
    size: int

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        """As ``Transport.exchange``."""


@runtime_checkable
class Transport(Protocol):
    """How ranks reach each other. ``lentando.comm.testing.check_transport`` is its conformance suite.

    Every method but ``exchange``, ``clock`` and ``abort`` is collective: all ranks call it, in the same order.

    Attributes:
        name: what users write into ``LENTANDO_TRANSPORT``.
        rank: this process, ``0 <= rank < size``.
        size: number of ranks in the job.
        local_rank: this process among those of its node.
        local_size: number of ranks on this node.
        traffic: counters of what this rank has sent.
    """

    name: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    traffic: Traffic

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        """Start sending to and receiving from several peers at once.

        Messages between the same two ranks with the same tag arrive in the order in which they were started. Arrays
        must stay untouched until the request is complete.

        Args:
            sends: (peer, array) pairs; the bytes of each array go to that peer.
            receives: (peer, array) pairs; each array is filled by that peer's message of the same size in bytes.
            tag: keeps independent streams of messages apart, ``0 <= tag < 32768``.
            overlap: the exchange makes progress while the caller computes. False says that the caller will wait at
                once, which saves the hand-over to a background thread.
        """

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        """Combine ``array`` over all ranks, in place, by the engine's own all-reduce.

        Every rank ends with the same bits. Sums of integers wrap around, as NumPy's do. In a minimum or maximum NaN
        wins, and -0 is less than +0, whatever the engine does by itself: see ``lentando.comm.extremes``.
        """

    def broadcast(self, array: Array, root: int = 0) -> None:
        """Fill ``array`` on every rank with the root's."""

    def allgather(self, array: Array) -> Array:
        """The arrays of all ranks, equal in shape and dtype, stacked by rank: shape ``(size, *array.shape)``."""

    def barrier(self) -> None:
        """Return once every rank has come here."""

    def clock(self) -> float:
        """Seconds since an arbitrary moment; virtual in a simulation."""

    def abort(self, status: int = 1) -> NoReturn:
        """End every process of the job now, with this exit status."""

    def close(self) -> None:
        """Release what the transport made. It owns nothing of the user's."""


@runtime_checkable
class VirtualTime(Protocol):
    """A transport in whose world time passes only where it is told to: a simulation's."""

    def compute(self) -> None:
        """Let the time of one training step's computation pass."""


@runtime_checkable
class SideChannel(Protocol):
    """A transport over which other threads can exchange short messages while the main thread waits or computes."""

    def open_side_channel(self) -> bool:
        """Make it; False if the engine lets one thread in only. Collective."""

    def send_nowait(self, peer: int, content: bytes) -> None:
        """Send without waiting, even if the peer never listens."""

    def receive_nowait(self) -> tuple[int, bytes] | None:
        """The next message that has come, with its sender; never blocks."""


@runtime_checkable
class Notices(Protocol):
    """A transport over which a rank can leave small numbers for others, who may read them while they wait.

    Its requests are ``TimedRequest``. Notices do not count as traffic.
    """

    def leave_notice(self, peer: int, number: int) -> None:
        """Leave a notice for another rank, without waiting for it. Those of one rank to another stay in order."""

    def read_notice(self, peer: int) -> int | None:
        """The next notice of another rank if it has come; never blocks."""

    def take_notice(self, peer: int) -> int:
        """The next notice of another rank, which has left it, or is about to."""


@runtime_checkable
class Background(Protocol):
    """A transport whose ranks can also be reached by another thread while the main thread computes."""

    def for_thread(self) -> Transport | None:
        """Another transport of the same ranks, for one other thread; None if the engine lets one thread in only.

        Collective. It is closed with this one.
        """


@runtime_checkable
class YieldsCPU(Protocol):
    """A transport that can leave the core to others while it waits: what it takes by itself then tells little.

    Attributes:
        yields_cpu: whether it does.
    """

    yields_cpu: bool


@runtime_checkable
class SharedNode(Protocol):
    """A transport whose ranks are processes, some of which run on the same node and can reach each other's memory.

    Attributes:
        same_node: the ranks of this rank's node, itself included, by local rank.
    """

    same_node: Sequence[int]

    def node_barrier(self) -> None:
        """Wait for all ranks of this node. What any of them wrote to memory before, all see after it."""


def shares_memory(transport: Transport) -> bool:
    """Whether this rank has neighbours that could reach its memory."""
    return isinstance(transport, SharedNode) and len(transport.same_node) > 1


def yields_cpu(transport: Transport) -> bool:
    """Whether this rank leaves the core to others while it waits."""
    return isinstance(transport, YieldsCPU) and transport.yields_cpu


@runtime_checkable
class DeviceArrays(Protocol):
    """A transport that also takes arrays on this rank's GPU. To one that does not say so, host memory is given.

    **A round is one exchange.** On a device, what a rank sends and receives in a round goes into one ``exchange``, and
    all ranks take their rounds in the same order, whatever the tag: each message is sent and received in exchanges of
    the same round. A device does one thing after the other; a rank that first only received would keep its device
    waiting in front of what the other waits for. Under this rule nobody waits forever: of the rounds that are not
    complete, take the first; all that came before it is complete, so on every rank it is the first in line, with its
    sends and receives, which progress together. Ranks may be any number of rounds apart meanwhile. Collectives are
    rounds too. Arrays in host memory that go with them do not count: they travel another way.

    **Who waits for whom.** An operation begins after all that its rank has enqueued before on CuPy's current stream (a
    framework's adapter makes that the framework's current stream). The host waits for its end: when ``wait`` or a
    collective returns, the arrays may be read and overwritten on any stream. Nothing else is waited for, and nothing
    runs on the current stream on behalf of a transport.

    Attributes:
        takes_device_arrays: whether it does, here and now.
    """

    takes_device_arrays: bool


def takes_device_arrays(transport: Transport) -> bool:
    """Whether arrays on this rank's GPU may be given to the transport."""
    return isinstance(transport, DeviceArrays) and transport.takes_device_arrays


@runtime_checkable
class BackendReduceScatter(Protocol):
    """A transport whose engine has the two halves of the all-reduce itself, for device arrays."""

    def reduce_scatter(self, array: Array, out: Array) -> None:
        """Sum ``array`` over all ranks; ``out`` becomes the part of it that is this rank's, of as many as ranks.

        Args:
            array: one-dimensional; its length is that of ``out`` times the number of ranks. Not changed.
            out: of the same dtype.
        """

    def allgather_into(self, part: Array, out: Array) -> None:
        """Fill ``out`` with the parts of all ranks, by rank.

        Args:
            part: one-dimensional. May be this rank's part of ``out`` itself.
            out: as many times as long as there are ranks.
        """


@runtime_checkable
class Elastic(Protocol):
    """A transport whose other ranks can go on when some die.

    What needs a rank that is dead raises ``RankLostError``: an exchange with it, and each collective on some ranks at
    least. That rank calls ``repair``, or votes no and then calls it, and from then on whatever the others do with the
    transport, or wait in, raises ``RankLostError`` too, until they call ``repair`` as well.
    """

    def vote(self, yes: bool) -> bool:
        """Whether all ranks say yes: the same answer on all that live, also when some die in the middle of it.

        False if any has died since the last repair, or somebody has begun one. After a no, all repair. Collective.
        """

    def repair(self) -> list[int]:
        """Leave out the dead. Collective over the living; survives deaths meanwhile.

        ``rank``, ``size`` and what else depends on who is there are then new, in the order of before. Messages under
        way are gone, and whatever was planned on this transport must be planned anew.

        Returns:
            the ranks of before of those that are left, by their rank of now.
        """


def check_rank(rank: int, size: int, doing: str) -> None:
    """Refuse a peer or root that does not exist.

    Raises:
        TransportError: that says what was ``doing`` with it.
    """
    if not 0 <= rank < size:
        raise TransportError(f"{doing} rank {rank}: expected a rank from 0 to {size - 1}")


def as_bytes(array: Array) -> NDArray[np.uint8]:
    """The memory of a contiguous array as bytes, so that dtypes foreign to the engine (bfloat16) travel too."""
    return array.reshape(-1).view(np.uint8)
