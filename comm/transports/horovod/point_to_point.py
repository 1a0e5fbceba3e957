"""Point-to-point messages over Horovod, which has only collectives.

All messages of all ranks are sent together in a round: one all-to-all. Horovod starts an operation once every rank has
submitted it, but a round is needed as soon as any rank has a message. So each rank has a bell: a tiny all-reduce that
all other ranks submit in advance. A rank with a message submits its own bell, too, which completes it on all ranks.
Each rank that sees a completed bell submits its own and joins the round. Between rounds nothing is sent except by
Horovod itself, when it is idle.
"""

import os
import threading
import time
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lentando.comm.errors import TransportError
from lentando.comm.pieces import longest_elements, pieces
from lentando.comm.transport import Array, Message, as_bytes
from lentando.comm.transports.horovod.binding import Collective, HorovodBinding, finish
from lentando.comm.transports.mailbox import Mailbox, Receive

__all__ = ["PointToPoint"]

WORD = np.dtype(np.int64)
"""Unit of the all-to-all, because Horovod counts elements in 32 bits."""
HEADER_WORDS = 3

SHORTEST_NAP_SECONDS = 2e-4
LONGEST_NAP_SECONDS = 4e-3
"""Intervals at which a rank polls the bells: the shortest after a round, longer the longer none is rung."""


@dataclass(frozen=True)
class _Outgoing:
    """A message that has not been sent yet."""

    peer: int
    tag: int
    array: Array
    request: "HorovodExchange"


class _PostedReceive(Receive):
    """A receive that stores its error for the caller, because another thread fills it."""

    error: TransportError | None = None

    def fill(self, message: Array) -> None:
        try:
            super().fill(message)
        except TransportError as error:
            self.error = error
            self.is_filled = True


class PointToPoint:
    """Starts exchanges, and performs them in a thread.

    Args:
        binding: initialised Horovod. All ranks make a ``PointToPoint`` at the same time.
    """

    def __init__(self, binding: HorovodBinding) -> None:
        self._binding = binding
        self._rank, self._size = binding.rank(), binding.size()
        self.changed = threading.Condition()
        self.failure: TransportError | None = None
        self._mailboxes: defaultdict[tuple[int, int], Mailbox] = defaultdict(Mailbox)  # by sender and tag
        self._queued: deque[_Outgoing] = deque()
        self._is_leaving = self._has_announced = self._has_left = False
        self._packed = np.empty(0, WORD)
        self._thread = threading.Thread(target=self._run, name="lentando-rounds", daemon=True)
        if self._size > 1:
            self._thread.start()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> "HorovodExchange":
        """Start an exchange, as ``Transport.exchange`` does."""
        longest = longest_elements(1, self._size)  # all others may send to one rank in the same round
        incoming = [(peer, piece) for peer, array in receives for piece in pieces(as_bytes(array), longest)]
        outgoing = [(peer, piece) for peer, array in sends for piece in pieces(as_bytes(array), longest)]
        with self.changed:
            posted = [_PostedReceive(piece) for _, piece in incoming]
            request = HorovodExchange(self, posted)
            for (peer, _), receive in zip(incoming, posted, strict=True):
                self._mailboxes[peer, tag].post(receive)
            for peer, array in outgoing:
                if peer == self._rank:
                    self._mailboxes[peer, tag].send(array)
                else:
                    request.unsent += 1
                    self._queued.append(_Outgoing(peer, tag, array, request))
            self.changed.notify_all()
        return request

    def close(self) -> None:
        """Return once all ranks have called it and all messages have arrived."""
        if self._size > 1:
            with self.changed:
                self._is_leaving = True
                self.changed.notify_all()
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._has_left:
                self._round()
        except BaseException as error:  # noqa: BLE001 - raised again in the callers that wait
            with self.changed:
                self.failure = error if isinstance(error, TransportError) else TransportError(f"Horovod: {error!r}")
                self.changed.notify_all()

    def _round(self) -> None:
        bells = {peer: self._bell(peer, 0) for peer in range(self._size) if peer != self._rank}
        self._listen(bells)
        with self.changed:
            outgoing = self._take()
            self._has_announced = self._is_leaving and not self._queued
        bells[self._rank] = self._bell(self._rank, int(self._has_announced))
        words, splits = self._pack(outgoing)
        round_trip = self._binding.alltoall("lentando.round", words, splits)
        with self.changed:  # the arrays have been copied
            for message in outgoing:
                message.request.unsent -= 1
            self.changed.notify_all()
        arrived = finish(round_trip)
        with self.changed:
            self._deliver(arrived)
            self.changed.notify_all()
        self._has_left = sum(int(finish(bell)[0]) for bell in bells.values()) == self._size

    def _bell(self, owner: int, word: int) -> Collective:
        """Submit a rank's bell. All but the owner contribute a 0; the sum is 1 if the owner is about to leave."""
        return self._binding.allreduce(f"lentando.bell.{owner}", np.array([word], WORD), "sum")

    def _listen(self, bells: Mapping[int, Collective]) -> None:
        """Return when a round is needed.

        Rank 0 starts a round after a long quiet time, before Horovod warns of operations that some ranks have not
        submitted.
        """
        nap = SHORTEST_NAP_SECONDS
        quiet_until = time.monotonic() + (_quiet_seconds() if self._rank == 0 else float("inf"))
        while time.monotonic() < quiet_until:
            with self.changed:
                if self._needs_round() or self.changed.wait_for(self._needs_round, nap):
                    return
            if any(bell.done() for bell in bells.values()):
                return
            nap = min(1.5 * nap, LONGEST_NAP_SECONDS)

    def _needs_round(self) -> bool:
        return bool(self._queued) or (self._is_leaving and not self._has_announced)

    def _take(self) -> list[_Outgoing]:
        """Take the messages of the next round from the queue, in order, as many as one all-to-all may move."""
        taken: list[_Outgoing] = []
        total, longest = 0, longest_elements(1, self._size)
        while self._queued and (not taken or total + self._queued[0].array.nbytes <= longest):
            total += self._queued[0].array.nbytes
            taken.append(self._queued.popleft())
        return taken

    def _pack(self, outgoing: Sequence[_Outgoing]) -> tuple[Array, list[int]]:
        """Return all messages by receiver (words of sender, tag, byte length, content), and the words per receiver."""
        splits = [0] * self._size
        for message in outgoing:
            splits[message.peer] += HEADER_WORDS + _words(message.array.nbytes)
        total = sum(splits)
        if self._packed.size < total:
            self._packed = np.empty(total, WORD)
        at = [0, *np.cumsum(splits).tolist()]
        for message in outgoing:
            start, length = at[message.peer], message.array.nbytes
            content = start + HEADER_WORDS
            self._packed[start:content] = self._rank, message.tag, length
            at[message.peer] = content + _words(length)
            self._packed[content : at[message.peer]].view(np.uint8)[:length] = as_bytes(message.array)
        return self._packed[:total], splits

    def _deliver(self, arrived: Array) -> None:
        start = 0
        while start < arrived.size:
            sender, tag, length = arrived[start : start + HEADER_WORDS].tolist()
            content = start + HEADER_WORDS
            start = content + _words(length)
            self._mailboxes[sender, tag].send(arrived[content:start].view(np.uint8)[:length])


class HorovodExchange:
    """Messages in flight.

    Args:
        channel: sends and receives the messages.
        receives: posted receives of the exchange.

    Attributes:
        unsent: number of messages to other ranks whose arrays are still needed.
    """

    def __init__(self, channel: PointToPoint, receives: Sequence[_PostedReceive]) -> None:
        self.unsent = 0
        self._channel = channel
        self._receives = receives

    def wait(self) -> None:
        with self._channel.changed:
            self._channel.changed.wait_for(lambda: self._is_complete() or self._channel.failure is not None)
        self.test()

    def wait_for(self, seconds: float) -> bool:
        with self._channel.changed:
            self._channel.changed.wait_for(lambda: self._is_complete() or self._channel.failure is not None, seconds)
        return self.test()

    def test(self) -> bool:
        if not self._is_complete() and self._channel.failure is not None:
            raise TransportError(str(self._channel.failure)) from self._channel.failure
        for receive in self._receives:
            if receive.error is not None:
                raise receive.error
        return self._is_complete()

    def _is_complete(self) -> bool:
        return self.unsent == 0 and all(receive.is_filled for receive in self._receives)


def _words(length_bytes: int) -> int:
    return -(-length_bytes // WORD.itemsize)


def _quiet_seconds() -> float:
    """A third of the time after which Horovod warns."""
    seconds = float(os.environ.get("HOROVOD_STALL_CHECK_TIME_SECONDS") or 60.0)
    return (seconds if seconds > 0 else 60.0) / 3
