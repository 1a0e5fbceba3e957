"""Ranks as threads, whose messages move as late, and in as unusual an order, as MPI permits."""

import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from typing import TypeVar

from lentando.comm.testing import ThreadTransport, run_ranks
from lentando.comm.transport import Array, Message, Request, as_bytes

T = TypeVar("T")

SECONDS = 20.0


def run_ranks_with_delays(size: int, function: Callable[[ThreadTransport], T]) -> list[T]:
    """As ``run_ranks``, but bytes move only when all ranks are blocked, and then those of the newest message first.

    They are read from the sender's memory at that moment: code that reuses it too early always sends wrong bytes.
    """
    wire = _Wire(size)

    def run(transport: ThreadTransport) -> T:
        try:
            return function(_DelayedTransport(transport, wire))
        finally:
            wire.finish()

    return run_ranks(size, run, timeout_seconds=SECONDS)


class _Transfer:
    """A message, first half known: what is sent or where it goes."""

    source: Array
    destination: Array
    done = False

    def move(self) -> None:
        as_bytes(self.destination)[...] = as_bytes(self.source)
        self.done = True


class _Wire:
    def __init__(self, size: int) -> None:
        self.changed = threading.Condition()
        self.matched: list[_Transfer] = []
        self.waiting: list[_DelayedExchange] = []
        self._size = size
        self._finished = 0
        self._sent: defaultdict[tuple[int, int], deque[_Transfer]] = defaultdict(deque)
        self._expected: defaultdict[tuple[int, int], deque[_Transfer]] = defaultdict(deque)

    def send(self, stream: tuple[int, int], array: Array) -> _Transfer:
        transfer = self._match(self._expected[stream], self._sent[stream])
        transfer.source = array
        return transfer

    def expect(self, stream: tuple[int, int], array: Array) -> _Transfer:
        transfer = self._match(self._sent[stream], self._expected[stream])
        transfer.destination = array
        return transfer

    def finish(self) -> None:
        with self.changed:
            self._finished += 1
            self.changed.notify_all()

    def all_ranks_are_blocked(self) -> bool:
        return sum(not exchange.test() for exchange in self.waiting) + self._finished == self._size

    def _match(self, others: deque[_Transfer], own: deque[_Transfer]) -> _Transfer:
        if others:
            transfer = others.popleft()
            self.matched.append(transfer)
        else:
            transfer = _Transfer()
            own.append(transfer)
        return transfer


class _DelayedExchange:
    def __init__(self, wire: _Wire, transfers: list[_Transfer]) -> None:
        self._wire, self._transfers = wire, transfers

    def test(self) -> bool:
        return all(transfer.done for transfer in self._transfers)

    def wait(self) -> None:
        with self._wire.changed:
            self._wire.waiting.append(self)
            while not self.test():
                self._wire.changed.notify_all()
                if self._wire.matched and self._wire.all_ranks_are_blocked():
                    self._wire.matched.pop().move()
                elif not self._wire.changed.wait(SECONDS):
                    raise TimeoutError("a message that never came")
            self._wire.waiting.remove(self)

    def wait_for(self, seconds: float) -> bool:
        self.wait()
        return True


class _DelayedTransport(ThreadTransport):
    def __init__(self, transport: ThreadTransport, wire: _Wire) -> None:
        super().__init__(transport.rank, transport._world)
        self._wire = wire

    def exchange(
        self, sends: Sequence[Message], receives: Sequence[Message], tag: int = 0, *, overlap: bool = True
    ) -> Request:
        with self._wire.changed:
            expected = [self._wire.expect((peer, self.rank), array) for peer, array in receives]
            sent = [self._wire.send((self.rank, peer), array) for peer, array in sends]
        return _DelayedExchange(self._wire, expected + sent)
