"""Messages within one process, matched in order, for the transports without a network."""

from collections import deque

from lentando.comm.errors import TransportError
from lentando.comm.transport import Array, as_bytes

__all__ = ["Mailbox", "Receive"]


class Receive:
    """A posted receive: an array to be filled by a message.

    Args:
        array: array to fill.

    Attributes:
        is_filled: whether the message has arrived.
    """

    def __init__(self, array: Array) -> None:
        self.is_filled = False
        self._array = array

    def fill(self, message: Array) -> None:
        """Copy the bytes of ``message`` into the array."""
        if message.nbytes != self._array.nbytes:
            raise TransportError(f"a message of {message.nbytes} bytes met a receive of {self._array.nbytes}")
        as_bytes(self._array)[...] = as_bytes(message)
        self.is_filled = True


class Mailbox:
    """Messages of one tag from one rank to another: the n-th send is matched with the n-th receive."""

    def __init__(self) -> None:
        self._sent: deque[Array] = deque()
        self._receives: deque[Receive] = deque()

    def send(self, message: Array) -> None:
        """Deliver ``message`` to the next receive, or keep a copy until there is one."""
        if self._receives:
            self._receives.popleft().fill(message)
        else:
            self._sent.append(message.copy())

    def post(self, receive: Receive) -> None:
        """Post a receive: fill it with the next message, now or when that is sent."""
        if self._sent:
            receive.fill(self._sent.popleft())
        else:
            self._receives.append(receive)
