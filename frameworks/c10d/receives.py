"""Receives that take their messages in the order in which they were started, each once its length has been compared.

Open MPI 5.0.11 writes a message that is longer than its receive beyond the end of the tensor. MPI is therefore given
memory only when a message has arrived, and has the length that is expected.
"""

from collections import deque
from collections.abc import Set
from typing import Protocol

from torch.distributed import DistBackendError

from lentando.comm.transport import Array, Request, Transport

__all__ = ["Messenger", "Receive", "Receives", "pieces_of"]


class Messenger(Transport, Protocol):
    """A transport that knows of a message before it is received."""

    def next_message(self, tag: int, source: int | None) -> tuple[int, int] | None:
        """Source and bytes of the message that would be received next; None if none has arrived."""

    def longest_message(self, peer: int) -> int:
        """Limit of the bytes of one message to or from a peer."""


def pieces_of(array: Array, longest: int) -> list[Array]:
    """The messages that carry an array. The last one is shorter than ``longest``: so the other side sees the end.

    Args:
        array: one-dimensional array of bytes.
        longest: limit of the bytes of a message.

    Example:
        >>> import numpy as np
        >>> [[piece.size for piece in pieces_of(np.zeros(size, np.uint8), 4)] for size in (0, 3, 4, 9)]
        [[0], [3], [4, 0], [4, 4, 1]]
    """
    return [array[start : start + longest] for start in range(0, array.size + 1, longest)]


class Receive:
    """A message that is expected, then received piece by piece.

    Args:
        transport: transport of the group.
        array: one-dimensional array of bytes. A shorter message fills the first ones.
        source: rank that sends; None for any.
        tag: tag of the message.

    Attributes:
        source: rank that sends; None if it is not known yet.
        tag: the same.
    """

    def __init__(self, transport: Messenger, array: Array, source: int | None, tag: int) -> None:
        self.source = source
        self.tag = tag
        self._transport = transport
        self._array = array
        self._left: deque[Array] | None = None
        self._requests: list[Request] = []
        self._error: DistBackendError | None = None

    def advance(self) -> bool:
        """Receive what has arrived. Return whether that is all of the message, or it is too long."""
        while self._left != deque() and self._error is None:
            found = self._transport.next_message(self.tag, self.source)
            if found is None:
                return False
            self._take(*found)
        return True

    def test(self) -> bool:
        """Whether the message is received, once ``advance`` has returned True.

        Raises:
            DistBackendError: if the message is longer than the array.
            TransportError: if it cannot be received.
        """
        if self._error is not None:
            raise self._error
        return all(request.test() for request in self._requests)

    def _take(self, source: int, length: int) -> None:
        longest = self._transport.longest_message(source)
        if self._left is None:
            self.source, self._left = source, deque(pieces_of(self._array, longest))
        piece = self._left.popleft()
        if length > piece.size:
            begins = self._array.size - piece.size - sum(each.size for each in self._left)
            self._error = DistBackendError(
                f"rank {self._transport.rank} receives into a tensor of {self._array.size} bytes, and rank {source} "
                f"has sent {'at least ' if length == longest else ''}{begins + length}: expected one as long"
            )
            return
        self._requests.append(self._transport.exchange([], [(source, piece[:length])], self.tag, overlap=False))
        if length < longest:
            self._left.clear()


class Receives:
    """The receives of a group that wait for their messages, for one thread at a time."""

    def __init__(self) -> None:
        self._waiting: dict[int, list[Receive]] = {}

    def add(self, receive: Receive) -> None:
        """Let a receive take its message after those that were added before."""
        self._waiting.setdefault(receive.tag, []).append(receive)

    def advance(self, tag: int) -> None:
        """Let the receives with a tag take what has arrived, each nothing that one before it may wait for."""
        still: list[Receive] = []
        sources = set[int | None]()
        for receive in self._waiting[tag]:
            if _may_take_the_same(receive.source, sources) or not receive.advance():
                still.append(receive)
                sources.add(receive.source)
        self._waiting[tag] = still

    def is_waiting(self, receive: Receive) -> bool:
        """Whether some of its message is still missing."""
        return receive in self._waiting[receive.tag]


def _may_take_the_same(source: int | None, others: Set[int | None]) -> bool:
    """Whether a message from a source, None for any, may be one from others."""
    return bool(others) and (source is None or source in others or None in others)
