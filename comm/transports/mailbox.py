"""Messages inside one process, matched as on a wire: shared by the transports that have no wire."""

from collections import deque

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, as_bytes

__all__ = ["Mailbox", "Receive"]


class Receive:
    """An array that waits for its message.

    Attributes:
        filled: whether it has come.
    """

    def __init__(self, array: Array) -> None:
        self.filled = False
        self._array = array

    def fill(self, message: Array) -> None:
        """Take the bytes of ``message``."""
        if message.nbytes != self._array.nbytes:
            raise TransportError(f"a message of {message.nbytes} bytes met a receive of {self._array.nbytes}")
        as_bytes(self._array)[...] = as_bytes(message)
        self.filled = True


class Mailbox:
    """Messages from one rank to another under one tag: the first that was sent goes to the first that was expected."""

    def __init__(self) -> None:
        self._sent: deque[Array] = deque()
        self._expected: deque[Receive] = deque()

    def send(self, message: Array) -> None:
        """Deliver ``message``, or keep a copy until somebody expects it."""
        if self._expected:
            self._expected.popleft().fill(message)
        else:
            self._sent.append(message.copy())

    def expect(self, receive: Receive) -> None:
        """Fill ``receive`` with the next message, now or when it is sent."""
        if self._sent:
            receive.fill(self._sent.popleft())
        else:
            self._expected.append(receive)
