"""Receives of one rank: which of them a message may be given to, and for which ones a poll looks."""

from typing import Any

import numpy as np

from lentando.c10d.receives import Receive, Receives
from lentando.comm.transports.single import SingleTransport


class Arrivals:
    """Messages of one byte that have arrived, and the looks for them."""

    def __init__(self, *messages: tuple[int, int]) -> None:
        self.rank = 0
        self._messages = list(messages)
        self._single = SingleTransport()
        self.looks: list[tuple[int, int | None]] = []

    def next_message(self, tag: int, source: int | None) -> tuple[int, int] | None:
        self.looks.append((tag, source))
        found = next((each for each in self._messages if each[0] == tag and source in (None, each[1])), None)
        return None if found is None else (found[1], 1)

    def longest_message(self, peer: int) -> int:
        return 100

    def exchange(self, sends: Any, receives: Any, tag: int, *, overlap: bool) -> Any:
        ((peer, array),) = receives
        self._messages.remove((tag, peer))
        array[0] = peer
        return self._single.exchange([], [])


def waiting_for(transport: Any, *wanted: tuple[int, int | None]) -> tuple[Receives, list[Receive]]:
    waiting = Receives()
    receives = [Receive(transport, np.zeros(1, np.uint8), source, tag) for tag, source in wanted]
    for receive in receives:
        waiting.add(receive)
    return waiting, receives


def test_receive_takes_no_message_that_one_before_it_may_wait_for() -> None:
    arrivals = Arrivals((0, 2), (0, 3))
    waiting, receives = waiting_for(arrivals, (0, 1), (0, 2), (0, 2), (0, None), (0, 3))
    waiting.advance(0)
    assert [waiting.is_waiting(receive) for receive in receives] == [True, False, True, True, True]
    assert arrivals.looks == [(0, 1), (0, 2), (0, 2)]


def test_poll_looks_for_messages_with_its_own_tag_only() -> None:
    arrivals = Arrivals((7, 1), (8, 1))
    waiting, receives = waiting_for(arrivals, (7, 1), (8, 1))
    waiting.advance(8)
    assert [waiting.is_waiting(receive) for receive in receives] == [True, False]
    assert arrivals.looks == [(8, 1)]
