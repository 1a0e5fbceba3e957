"""The messages by which ranks negotiate: to rank 0, which decides, and from there to all ranks."""

import json
from collections import deque
from collections.abc import Sequence
from typing import Any

from lentando.comm.asynchronous.coordinator import Coordinator, Message
from lentando.comm.asynchronous.names import Names
from lentando.comm.capabilities import SideChannel
from lentando.comm.errors import TransportError

__all__ = ["Negotiation", "OtherRankFailedError"]


class OtherRankFailedError(TransportError):
    """Another rank has reported an error that ends all asynchronous operations."""


class Negotiation:
    """One rank's part in the negotiation. No method blocks.

    Args:
        rank: number of this rank.
        numbers: numbers of all ranks in the job, for messages.
        channel: channel for short messages, which no other code uses.

    Attributes:
        decisions: decisions of rank 0 that this rank has not followed yet, in order.
    """

    def __init__(self, rank: int, numbers: Sequence[int], channel: SideChannel) -> None:
        self.decisions: deque[Message] = deque()
        self._rank, self._size = rank, len(numbers)
        self._channel = channel
        self._coordinator = Coordinator(numbers) if rank == 0 else None
        self._names_sent, self._names_received = Names(), Names()

    def encode(self, key: str, description: str) -> Any:
        """What is sent to rank 0 for an operation."""
        return self._names_sent.encode((key, description))

    def decode(self, sent: Any) -> tuple[str, str]:
        """Key and description of an operation that rank 0 lets all ranks run."""
        return self._names_received.decode(sent)

    def report(self, message: Message) -> None:
        """Send a message to rank 0."""
        if self._coordinator is not None:
            self._coordinator.receive(0, message)
        else:
            self._channel.send_nowait(0, json.dumps(message).encode())

    def report_failure(self, text: str) -> None:
        """Send an error that ends all operations to all other ranks."""
        content = json.dumps({"failure": text}).encode()
        for peer in range(self._size):
            if peer != self._rank:
                self._channel.send_nowait(peer, content)

    def poll(self) -> bool:
        """Receive what has arrived, and let rank 0 decide. Returns whether there was anything but reports of waits.

        Raises:
            OtherRankFailedError: if another rank has reported an error that ends all operations.
        """
        has_any = False
        while (received := self._channel.receive_nowait()) is not None:
            peer, content = received
            message = json.loads(content)
            has_any |= "idle" not in message
            if "failure" in message:
                raise OtherRankFailedError(message["failure"])
            if self._coordinator is not None:
                self._coordinator.receive(peer, message)
            else:
                self.decisions.append(message)
        return has_any | self._decide()

    def _decide(self) -> bool:
        if self._coordinator is None:
            return False
        decisions = self._coordinator.decide()
        for decision in decisions:
            content = json.dumps(decision).encode()
            for peer in range(1, self._size):
                self._channel.send_nowait(peer, content)
        self.decisions.extend(decisions)
        return bool(decisions)

    @property
    def has_sent_all(self) -> bool:
        """Whether no message of this rank still needs it to make progress."""
        return self._channel.has_sent_all()
