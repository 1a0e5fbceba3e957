"""The interface to the backends that carry messages, which MPI, Horovod, NCCL, a world of 1 and others implement.

Arrays are C-contiguous NumPy arrays, and CuPy arrays where the transport takes them (``DeviceArrays``). A transport
moves and reduces bytes; it knows no model and no algorithm. What only some transports can do is described by the
optional protocols of ``lentando.comm.capabilities``.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NoReturn, Protocol, TypeAlias, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from lentando.comm.errors import TransportError

__all__ = [
    "Array",
    "Exchanges",
    "Message",
    "ReduceOp",
    "Request",
    "Traffic",
    "Transport",
    "as_bytes",
    "check_rank",
]

Array: TypeAlias = NDArray[Any]
Message: TypeAlias = tuple[int, Array]
"""A peer's rank, and the array that is sent to it or filled by it."""
ReduceOp: TypeAlias = Literal["sum", "min", "max"]


@dataclass
class Traffic:
    """Counters of what one rank has sent.

    Attributes:
        messages: number of point-to-point messages sent.
        collectives: number of the backend's own collective operations that this rank took part in.
        bytes_sent: bytes of the messages, plus for each collective of the backend the bytes that a bandwidth-optimal
            algorithm sends per rank (all-reduce 2(n-1)/n of the array, all-gather n-1 times the array, broadcast one
            array from the root), because a backend does not report them.
    """

    messages: int = 0
    collectives: int = 0
    bytes_sent: int = 0

    def count_collective(self, bytes_sent: int) -> None:
        """Count one more collective, with the bytes that this rank has sent for it."""
        self.collectives += 1
        self.bytes_sent += bytes_sent

    def take_over(self, other: "Traffic") -> None:
        """Add the counts of another counter, which is set to zero."""
        self.messages += other.messages
        self.collectives += other.collectives
        self.bytes_sent += other.bytes_sent
        other.messages = other.collectives = other.bytes_sent = 0

    def copy(self) -> "Traffic":
        """A snapshot to subtract from later."""
        return Traffic(self.messages, self.collectives, self.bytes_sent)


class Request(Protocol):
    """An exchange in flight. It keeps the arrays alive until it is complete."""

    def wait(self) -> None:
        """Block until every send may be overwritten and every receive is filled. Raises ``TransportError``."""

    def test(self) -> bool:
        """True once complete. Never blocks."""


class Exchanges(Protocol):
    """Ranks that exchange messages: the part of a transport that a ring needs.

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
    """The communication between ranks. ``lentando.comm.testing.check_transport`` is its conformance suite.

    Every method but ``exchange``, ``clock`` and ``abort`` is collective: all ranks call it, in the same order.

    Attributes:
        name: the value of ``LENTANDO_TRANSPORT`` that selects it.
        rank: number of this process, ``0 <= rank < size``.
        size: number of ranks in the job.
        local_rank: number of this process among those of its node.
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
        must not be changed or read until the request is complete.

        Args:
            sends: (peer, array) pairs; the bytes of each array are sent to that peer.
            receives: (peer, array) pairs; each array is filled by that peer's message of the same size in bytes.
            tag: number that keeps independent streams of messages apart, ``0 <= tag < 32768``.
            overlap: whether the exchange makes progress while the caller computes. False declares that the caller will
                wait at once, which saves the hand-over to a background thread.
        """

    def allreduce(self, array: Array, op: ReduceOp = "sum") -> None:
        """Combine ``array`` over all ranks, in place, by the backend's own all-reduce.

        The result is bit-identical on every rank. Sums of integers wrap around, as NumPy's do. In a minimum or maximum,
        NaN wins and -0 is less than +0, whatever the backend does (``lentando.comm.extremes`` implements this).
        """

    def broadcast(self, array: Array, root: int = 0) -> None:
        """Fill ``array`` on every rank with the root's."""

    def allgather(self, array: Array) -> Array:
        """The arrays of all ranks, equal in shape and dtype, stacked by rank: shape ``(size, *array.shape)``."""

    def barrier(self) -> None:
        """Return once every rank has called this method."""

    def clock(self) -> float:
        """Seconds since an arbitrary moment; virtual in a simulation."""

    def abort(self, status: int = 1) -> NoReturn:
        """End every process of the job immediately, with this exit status."""

    def close(self) -> None:
        """Release all resources that the transport has created, and none of the user's."""


def check_rank(rank: int, size: int, doing: str) -> None:
    """Check that the rank of a peer or root exists.

    Args:
        rank: the rank to be checked.
        size: number of ranks.
        doing: start of the error message, such as ``send to``.

    Raises:
        TransportError: if it does not exist.
    """
    if not 0 <= rank < size:
        raise TransportError(f"{doing} rank {rank}: expected a rank from 0 to {size - 1}")


def as_bytes(array: Array) -> NDArray[np.uint8]:
    """The memory of a contiguous array as bytes, to send dtypes that a backend does not know, such as bfloat16."""
    return array.reshape(-1).view(np.uint8)
