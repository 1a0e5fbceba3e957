"""Messages between two ranks, over an engine that has only collectives.

All that the ranks have to send crosses together, in a round: one all-to-all. Horovod begins an operation once every
rank has asked for it, but a round is wanted as soon as any rank has a message. So each rank has a bell: a tiny
all-reduce that all others ask for in advance. The rank that has a message asks for its own too, which completes it
everywhere; who hears a bell rings its own and joins the round. Between rounds nothing is sent but what Horovod's idle
engine sends by itself.
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
from lentando.comm.transports.horovod.engine import Collective, Engine, finish
from lentando.comm.transports.mailbox import Mailbox, Receive

__all__ = ["PointToPoint"]

WORD = np.dtype(np.int64)
"""Unit of the all-to-all: Horovod counts in 32 bits."""
HEADER_WORDS = 3

SHORTEST_NAP_SECONDS = 2e-4
LONGEST_NAP_SECONDS = 4e-3
"""Of a rank that listens for bells: short after a round, longer as nothing happens."""


@dataclass(frozen=True)
class _Outgoing:
    peer: int
    tag: int
    array: Array
    request: "HorovodExchange"


class _Expected(Receive):
    """A receive that keeps its error for the caller: the message comes while another thread is at work."""

    error: TransportError | None = None

    def fill(self, message: Array) -> None:
        try:
            super().fill(message)
        except TransportError as error:
            self.error = error
            self.filled = True


class PointToPoint:
    """Starts exchanges, and carries them out in a thread of its own.

    Args:
        engine: Horovod. Every rank makes its ``PointToPoint`` at the same time.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._rank, self._size = engine.rank(), engine.size()
        self.changed = threading.Condition()
        self.failure: TransportError | None = None
        self._mailboxes: defaultdict[tuple[int, int], Mailbox] = defaultdict(Mailbox)  # by sender and tag
        self._queued: deque[_Outgoing] = deque()
        self._leaving = self._announced = self._left = False
        self._packed = np.empty(0, WORD)
        self._thread = threading.Thread(target=self._run, name="lentando-rounds", daemon=True)
        if self._size > 1:
            self._thread.start()

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], tag: int) -> "HorovodExchange":
        """As ``Transport.exchange``."""
        longest = longest_elements(1, self._size)  # all others may send to one rank in the same round
        incoming = [(peer, piece) for peer, array in receives for piece in pieces(as_bytes(array), longest)]
        outgoing = [(peer, piece) for peer, array in sends for piece in pieces(as_bytes(array), longest)]
        with self.changed:
            expected = [_Expected(piece) for _, piece in incoming]
            request = HorovodExchange(self, expected)
            for (peer, _), receive in zip(incoming, expected, strict=True):
                self._mailboxes[peer, tag].expect(receive)
            for peer, array in outgoing:
                if peer == self._rank:
                    self._mailboxes[peer, tag].send(array)
                else:
                    request.unsent += 1
                    self._queued.append(_Outgoing(peer, tag, array, request))
            self.changed.notify_all()
        return request

    def close(self) -> None:
        """Return once every rank has come here, and all that was sent has arrived."""
        if self._size > 1:
            with self.changed:
                self._leaving = True
                self.changed.notify_all()
            self._thread.join()

    def _run(self) -> None:
        try:
            while not self._left:
                self._round()
        except BaseException as error:  # noqa: BLE001 - the callers that wait must learn of it, whatever it is
            with self.changed:
                self.failure = error if isinstance(error, TransportError) else TransportError(f"Horovod: {error!r}")
                self.changed.notify_all()

    def _round(self) -> None:
        bells = {peer: self._bell(peer, 0) for peer in range(self._size) if peer != self._rank}
        self._listen(bells)
        with self.changed:
            outgoing = self._take()
            self._announced = self._leaving and not self._queued
        bells[self._rank] = self._bell(self._rank, int(self._announced))
        words, splits = self._pack(outgoing)
        crossing = self._engine.alltoall("lentando.round", words, splits)
        with self.changed:  # what is sent was copied
            for message in outgoing:
                message.request.unsent -= 1
            self.changed.notify_all()
        arrived = finish(crossing)
        with self.changed:
            self._deliver(arrived)
            self.changed.notify_all()
        self._left = sum(int(finish(bell)[0]) for bell in bells.values()) == self._size

    def _bell(self, owner: int, word: int) -> Collective:
        """Ask for a rank's bell: all but the owner do so with a 0, and hear whether the owner is about to leave."""
        return self._engine.allreduce(f"lentando.bell.{owner}", np.array([word], WORD), "sum")

    def _listen(self, bells: Mapping[int, Collective]) -> None:
        """Return when there is reason for a round.

        Rank 0 makes one when nothing has happened for long: Horovod warns of operations for which ranks wait.
        """
        nap = SHORTEST_NAP_SECONDS
        quiet_until = time.monotonic() + (_quiet_seconds() if self._rank == 0 else float("inf"))
        while time.monotonic() < quiet_until:
            with self.changed:
                if self._wanted() or self.changed.wait_for(self._wanted, nap):
                    return
            if any(bell.done() for bell in bells.values()):
                return
            nap = min(1.5 * nap, LONGEST_NAP_SECONDS)

    def _wanted(self) -> bool:
        return bool(self._queued) or (self._leaving and not self._announced)

    def _take(self) -> list[_Outgoing]:
        """The messages of the next round, in the order in which they were started: as many as one call may move."""
        taken: list[_Outgoing] = []
        total, longest = 0, longest_elements(1, self._size)
        while self._queued and (not taken or total + self._queued[0].array.nbytes <= longest):
            total += self._queued[0].array.nbytes
            taken.append(self._queued.popleft())
        return taken

    def _pack(self, outgoing: Sequence[_Outgoing]) -> tuple[Array, list[int]]:
        """Rank by rank, each message as its sender, tag, length in bytes, and content in whole words."""
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
    """Messages under way.

    Attributes:
        unsent: messages to others whose arrays are still needed.
    """

    def __init__(self, channel: PointToPoint, expected: Sequence[_Expected]) -> None:
        self.unsent = 0
        self._channel = channel
        self._expected = expected

    def wait(self) -> None:
        with self._channel.changed:
            self._channel.changed.wait_for(lambda: self._complete() or self._channel.failure is not None)
        self.test()

    def wait_for(self, seconds: float) -> bool:
        with self._channel.changed:
            self._channel.changed.wait_for(lambda: self._complete() or self._channel.failure is not None, seconds)
        return self.test()

    def test(self) -> bool:
        if not self._complete() and self._channel.failure is not None:
            raise TransportError(str(self._channel.failure)) from self._channel.failure
        for receive in self._expected:
            if receive.error is not None:
                raise receive.error
        return self._complete()

    def _complete(self) -> bool:
        return self.unsent == 0 and all(receive.filled for receive in self._expected)


def _words(length_bytes: int) -> int:
    return -(-length_bytes // WORD.itemsize)


def _quiet_seconds() -> float:
    """A third of the time after which Horovod warns."""
    seconds = float(os.environ.get("HOROVOD_STALL_CHECK_TIME_SECONDS") or 60.0)
    return (seconds if seconds > 0 else 60.0) / 3
