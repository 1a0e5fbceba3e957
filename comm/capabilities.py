"""Optional protocols of transports: what some of them can do in addition to ``lentando.comm.transport.Transport``.

A transport implements those that its backend supports. Code that needs one asks by ``isinstance``, or by the functions
below where an attribute has to be true as well.
"""

from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from lentando.comm.transport import Array, Request, Transport

__all__ = [
    "BackendReduceScatter",
    "Background",
    "DeviceArrays",
    "Elastic",
    "Interruptible",
    "Notices",
    "SharedNode",
    "SideChannel",
    "Subsets",
    "TimedRequest",
    "VirtualTime",
    "YieldsCPU",
    "shares_memory",
    "takes_device_arrays",
    "yields_cpu",
]


@runtime_checkable
class VirtualTime(Protocol):
    """A simulated transport, whose clock advances only where the simulation says so."""

    def compute(self) -> None:
        """Advance the clock by the computation time of one training step."""


@runtime_checkable
class SideChannel(Protocol):
    """A transport over which other threads can exchange short messages while the main thread waits or computes."""

    def open_side_channel(self) -> bool:
        """Open the channel; False if the backend admits one thread only. Collective."""

    def send_nowait(self, peer: int, content: bytes) -> None:
        """Send without waiting, even if the peer never receives."""

    def receive_nowait(self) -> tuple[int, bytes] | None:
        """The sender and content of the next message that has arrived, None if there is none. Never blocks."""

    def has_sent_all(self) -> bool:
        """Whether all messages arrive even if this rank makes no more calls. Never blocks."""


class TimedRequest(Request, Protocol):
    """A request whose wait can be limited in time."""

    def wait_for(self, seconds: float) -> bool:
        """True once complete; False after about this time, or as soon as there is a notice to read.

        Raises:
            TransportError: as ``wait``.
        """


@runtime_checkable
class Notices(Protocol):
    """A transport over which a rank can leave small numbers for others, who may read them while they wait.

    Its requests are ``TimedRequest``. Notices do not count as traffic.
    """

    def leave_notice(self, peer: int, number: int) -> None:
        """Leave a notice for another rank, without waiting for it. Those of one rank to another stay in order."""

    def read_notice(self, peer: int) -> int | None:
        """The next notice of another rank, None if it has not arrived. Never blocks."""

    def take_notice(self, peer: int) -> int:
        """Wait for the next notice of another rank, which has left it or is about to."""


@runtime_checkable
class Background(Protocol):
    """A transport whose ranks another thread can communicate with while the main thread computes."""

    def for_thread(self) -> Transport | None:
        """Another transport of the same ranks, for one other thread; None if the backend admits one thread only.

        Collective. It is closed together with this one.
        """


@runtime_checkable
class Subsets(Protocol):
    """A transport some of whose ranks can communicate over a transport of their own."""

    def for_ranks(self, ranks: Sequence[int]) -> Transport | None:
        """A transport of some of the ranks. Collective over all ranks, members or not.

        Messages and collectives over it are never matched with those over another transport, and it counts its own
        traffic. It is closed by its members, before this one.

        Args:
            ranks: the members, in ascending order and equal on all ranks; they are numbered in this order.

        Returns:
            the transport; None on a rank that is not a member.
        """


@runtime_checkable
class Interruptible(Protocol):
    """A transport whose waits can be paced, and ended by an error.

    Attributes:
        while_waiting: called again and again by the thread that waits for other ranks. It may sleep. An exception that
            it raises ends the wait, after which the transport cannot be used any more. None for the default.
    """

    while_waiting: Callable[[], None] | None


@runtime_checkable
class YieldsCPU(Protocol):
    """A transport that can poll and sleep while it waits, instead of spinning.

    Timings of its operations alone are then not representative.

    Attributes:
        yields_cpu: whether it does so now.
    """

    yields_cpu: bool


def yields_cpu(transport: Transport) -> bool:
    """Whether this rank yields the processor to other threads and processes while it waits."""
    return isinstance(transport, YieldsCPU) and transport.yields_cpu


@runtime_checkable
class SharedNode(Protocol):
    """A transport whose ranks are processes; those on the same node can access each other's memory.

    Attributes:
        same_node: the ranks of this rank's node, itself included, by local rank.
    """

    same_node: Sequence[int]

    def node_barrier(self) -> None:
        """Wait for all ranks of this node. What any of them wrote to memory before is visible to all of them after."""


def shares_memory(transport: Transport) -> bool:
    """Whether there are other ranks on this node that could access this rank's memory."""
    return isinstance(transport, SharedNode) and len(transport.same_node) > 1


@runtime_checkable
class DeviceArrays(Protocol):
    """A transport that also takes arrays on this rank's GPU. All other transports are given host memory.

    **A round is one exchange.** All device arrays that a rank sends and receives in a round are passed to one
    ``exchange``, and all ranks execute their rounds in the same order, whatever the tag: each message is sent and
    received in exchanges of the same round. A device executes one operation after the other; a rank that first only
    received would block its device in front of the send that the other rank waits for. This rule excludes deadlocks: of
    the rounds that are not complete, consider the first. All earlier ones are complete, so on every rank it is the next
    to be executed, with its sends and receives, which progress together. Ranks may be any number of rounds apart
    meanwhile. Collectives are rounds too. Arrays in host memory that accompany them do not count: they take another
    path.

    **Synchronisation with streams.** An operation starts after everything that its rank has enqueued before on CuPy's
    current stream (a framework's adapter makes that the framework's current stream). The host waits for its end: when
    ``wait`` or a collective returns, the arrays may be read and overwritten on any stream. Nothing else is waited for,
    and nothing runs on the current stream on behalf of a transport.

    Attributes:
        takes_device_arrays: whether it does so in this process.
    """

    takes_device_arrays: bool


def takes_device_arrays(transport: Transport) -> bool:
    """Whether arrays on this rank's GPU may be passed to the transport."""
    return isinstance(transport, DeviceArrays) and transport.takes_device_arrays


@runtime_checkable
class BackendReduceScatter(Protocol):
    """A transport whose backend has a reduce-scatter and an all-gather of its own, for arrays on a GPU."""

    def reduce_scatter(self, array: Array, out: Array) -> None:
        """Sum ``array`` over all ranks, and store this rank's part of the sum in ``out``.

        Args:
            array: one-dimensional array, whose length is that of ``out`` times the number of ranks; not changed.
            out: one-dimensional array of the same dtype.
        """

    def allgather_into(self, part: Array, out: Array) -> None:
        """Fill ``out`` with the parts of all ranks, by rank.

        Args:
            part: one-dimensional array. May be this rank's part of ``out`` itself.
            out: one-dimensional array, whose length is that of ``part`` times the number of ranks.
        """


@runtime_checkable
class Elastic(Protocol):
    """A transport whose remaining ranks can continue when some die.

    Every operation that needs a dead rank raises ``RankLostError``: an exchange with it, and each collective on some
    ranks at least. A rank that gets this error calls ``repair``, or votes no and then calls it. From then on, every
    operation of the other ranks on this transport raises ``RankLostError`` too, until they have called ``repair``.
    """

    def vote(self, yes: bool) -> bool:
        """Whether all ranks vote yes: the same answer on all survivors, also if ranks die during the vote.

        False if any rank has died since the last repair, or has begun one. After a no, all ranks call ``repair``.
        Collective.
        """

    def repair(self) -> list[int]:
        """Exclude the dead ranks. Collective over the survivors; tolerates further deaths meanwhile.

        ``rank``, ``size`` and everything else that depends on the participants then have new values; the order of ranks
        is kept. Messages in flight are lost, and everything planned on this transport must be planned again.

        Returns:
            the previous ranks of the survivors, by their present rank.
        """
