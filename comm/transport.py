"""The seam to what carries messages: a small protocol that MPI, a world of one, and others implement.

Arrays are C-contiguous NumPy arrays. A transport moves and reduces bytes; it knows no model and no algorithm.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

__all__ = ["Array", "Message", "ReduceOp", "Request", "Traffic", "Transport", "VirtualTime", "as_bytes"]

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

    def copy(self) -> "Traffic":
        """A snapshot to subtract from later."""
        return Traffic(self.messages, self.collectives, self.bytes_sent)


class Request(Protocol):
    """An exchange under way. It keeps the arrays alive until it is complete."""

    def wait(self) -> None:
        """Block until every send may be overwritten and every receive is filled. Raises ``TransportError``."""

    def test(self) -> bool:
        """True once complete; never blocks."""


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
        """Combine ``array`` over all ranks, in place, by the engine's own all-reduce."""

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


def as_bytes(array: Array) -> NDArray[np.uint8]:
    """The memory of a contiguous array as bytes, so that dtypes foreign to the engine (bfloat16) travel too."""
    return array.reshape(-1).view(np.uint8)
