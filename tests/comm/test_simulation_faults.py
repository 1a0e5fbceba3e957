"""Faults by script: what is late, lost or doubled, and who dies, exactly as asked."""

from collections.abc import Callable
from math import inf

import numpy as np
import pytest

from lentando.comm.errors import ConfigurationError, DeadlockError, RankLostError
from lentando.comm.simulation import (
    Compute,
    Death,
    Delay,
    Drop,
    Duplicate,
    Fault,
    Network,
    Pause,
    Sent,
    SimulatedTransport,
    Slow,
    simulate,
)

SLOW = Network(1.0, inf)


def listen(transport: SimulatedTransport) -> list[tuple[float, float]]:
    """Rank 0 sends 0 to 4, one per second; rank 1 returns what it receives within 20 seconds, and when."""
    if transport.rank == 0:
        for number in range(5):
            transport.exchange([(1, np.array([float(number)]))], []).wait()
            transport.compute(1.0)
        return []
    arrivals, received = [], np.empty(1)
    request = transport.exchange([], [(0, received)])
    while transport.clock() < 20:
        if request.test():
            arrivals.append((float(received[0]), transport.clock()))
            request = transport.exchange([], [(0, received)])
        transport.compute(0.5)
    return arrivals


def arrivals(*faults: Fault, seed: int = 0, network: Network = SLOW) -> list[tuple[float, float]]:
    found: list[tuple[float, float]] = simulate(listen, 2, network=network, faults=faults, seed=seed)[1]
    return found


def test_without_faults_everything_arrives_once_in_time() -> None:
    assert arrivals() == [(0, 1), (1, 2), (2, 3), (3, 4), (4, 5)]


def test_a_delayed_message_holds_up_those_behind_it() -> None:
    assert arrivals(Delay(2.5, nth=1)) == [(0, 1), (1, 4.5), (2, 5), (3, 5.5), (4, 6)]


def test_a_delayed_message_is_overtaken_if_the_network_reorders() -> None:
    found = arrivals(Delay(2.5, nth=1), network=Network(1.0, inf, reordering=True))
    assert [number for number, _ in found] == [0, 2, 3, 1, 4]


def test_a_dropped_message_never_arrives() -> None:
    assert arrivals(Drop(nth=3)) == [(0, 1), (1, 2), (2, 3), (4, 5)]
    assert arrivals(Drop()) == []


def test_a_duplicated_message_arrives_twice() -> None:
    assert arrivals(Duplicate(nth=2)) == [(0, 1), (1, 2), (2, 3), (2, 3.5), (3, 4), (4, 5)]


def test_faults_add_up() -> None:
    assert arrivals(Delay(1.0, nth=4), Delay(1.0, nth=4), Drop(nth=0)) == [(1, 2), (2, 3), (3, 4), (4, 7)]


@pytest.mark.parametrize(
    ("fault", "lost"),
    [
        (Drop(sender=0), {0, 1, 2, 3, 4}),
        (Drop(sender=1), set()),
        (Drop(receiver=0), set()),
        (Drop(receiver=1, nth=4), {4}),
        (Drop(tag=0, after_seconds=3.0), {3, 4}),
        (Drop(tag=1), set()),
        (Drop(after_seconds=1.0, nth=1), {2}),
        (Drop(probability=0.0), set()),
    ],
)
def test_a_fault_hits_the_messages_it_names(fault: Drop, lost: set[int]) -> None:
    assert {0, 1, 2, 3, 4} - {number for number, _ in arrivals(fault)} == lost


def test_faults_by_chance_are_as_frequent_as_asked_and_the_same_every_time() -> None:
    def worker(transport: SimulatedTransport) -> None:
        for _ in range(2000):
            transport.exchange([(0, np.zeros(1))], [])

    def lost(seed: int) -> list[int]:
        log: list[Sent] = []
        simulate(worker, 1, faults=[Drop(probability=0.2)], seed=seed, observe=log.append)
        assert all((sent.copies == 0) == (sent.arrives_at_seconds == inf) for sent in log)
        return [number for number, sent in enumerate(log) if sent.copies == 0]

    assert lost(1) == lost(1) != lost(2)
    assert len(lost(1)) == pytest.approx(400, abs=60)


def test_what_a_dead_rank_has_sent_arrives_and_nothing_more() -> None:
    assert arrivals(Death(0, 2.5)) == [(0, 1), (1, 2), (2, 3)]


@pytest.mark.parametrize("doing", ["computing", "waiting", "polling", "joining"])
def test_a_rank_dies_whatever_it_is_doing(doing: str) -> None:
    cleaned: list[float] = []

    def worker(transport: SimulatedTransport) -> str:
        try:
            if transport.rank == 0:
                transport.compute(5.0)
            elif doing == "computing":
                while True:
                    transport.compute(1.0)
            elif doing == "joining":
                transport.barrier()
            else:
                request = transport.exchange([], [(0, np.empty(1))])
                while doing == "polling":
                    request.test()
                request.wait()
            return "lived"
        finally:
            cleaned.append(transport.rank)

    assert simulate(worker, 2, faults=[Death(1, 2.5)]) == ["lived", None]
    assert cleaned == [1, 0]


def test_a_dying_rank_cannot_send_its_last_will() -> None:
    def worker(transport: SimulatedTransport) -> bool:
        if transport.rank == 1:
            try:
                transport.compute(5.0)
            finally:
                transport.exchange([(0, np.zeros(1))], [])
        request = transport.exchange([], [(1, np.empty(1))])
        transport.compute(9.0)
        return request.test()

    assert simulate(worker, 2, faults=[Death(1, 2.5)]) == [False, None]
    assert simulate(worker, 2)[0]


def test_a_rank_that_dies_before_it_starts_does_nothing() -> None:
    started: list[int] = []
    assert simulate(lambda transport: started.append(transport.rank), 2, faults=[Death(0, 0.0)]) == [None, None]
    assert started == [1]


def test_a_death_after_the_end_changes_nothing() -> None:
    assert simulate(lambda transport: transport.rank, 2, faults=[Death(0, 9.0)]) == [0, 1]


def test_a_rank_dies_at_a_message_and_those_before_it_have_left() -> None:
    assert arrivals(Death(0, at_message=3)) == [(0, 1), (1, 2), (2, 3)]

    def worker(transport: SimulatedTransport) -> float:
        received = [np.zeros(1) for _ in range(2)]
        if transport.rank == 0:
            transport.exchange([(1, np.ones(1)), (2, np.ones(1))], []).wait()
        request = transport.exchange([], [(0, received[0])])
        transport.compute(1.0)
        return float(received[0][0]) if request.test() else 0.0

    assert simulate(worker, 3, faults=[Death(0, at_message=1)]) == [None, 1.0, 0.0]  # of one exchange


def test_a_rank_dies_in_a_collective_to_which_it_has_given_its_part() -> None:
    def worker(transport: SimulatedTransport) -> float:
        total = np.ones(1)
        for _ in range(2):
            transport.allreduce(total)
        return float(total[0])

    with pytest.raises(DeadlockError, match=r"collective number 1 \(rank 1 died"):
        simulate(worker, 3, faults=[Death(1, in_collective=0)])
    assert simulate(worker, 3, faults=[Death(1, in_collective=1)]) == [9.0, None, 9.0]


def test_elastic_ranks_are_notified_so_long_after_a_death() -> None:
    def worker(transport: SimulatedTransport) -> float:
        if transport.rank == 1:
            transport.compute(9.0)
        with pytest.raises(RankLostError, match="rank 1 of the start died at 2 s"):
            transport.exchange([], [(1, np.empty(1))]).wait()
        return transport.clock()

    assert simulate(worker, 3, faults=[Death(1, 2.0)], notice_seconds=0.5) == [2.5, None, 2.5]


def test_a_rank_that_stands_still_continues_later_and_gets_what_was_sent_to_it() -> None:
    assert arrivals(Pause(0, 1.5, 10.0)) == [(0, 1), (1, 2), (2, 13), (3, 14), (4, 15)]
    assert arrivals(Pause(1, 2.0, 3.0)) == [(0, 1), (1, 2), (2, 5.5), (3, 6), (4, 6.5)]


def test_steps_of_a_slow_rank_take_longer() -> None:
    def worker(transport: SimulatedTransport) -> float:
        transport.compute()
        return transport.clock()

    compute = Compute(1.0, stragglers={0: 2.0})
    assert simulate(worker, 3, compute=compute, faults=[Slow(0, 3.0), Slow(1, 5.0)]) == [6.0, 5.0, 1.0]


def test_who_waits_for_the_dead_is_reported() -> None:
    def worker(transport: SimulatedTransport) -> None:
        transport.compute(1.0)
        if transport.rank == 2:
            transport.exchange([], [(1, np.empty(1))], 4).wait()
        transport.barrier()

    with pytest.raises(DeadlockError) as caught:
        simulate(worker, 3, faults=[Death(1, 0.5)])
    assert "rank 2 waits for 8 bytes from rank 1 (tag 4), which died at 0.5 s, in" in str(caught.value)
    assert "join barrier, collective number 0 (rank 1 died at 0.5 s), in" in str(caught.value)


def test_a_lost_message_of_a_synchronous_program_is_a_deadlock() -> None:
    def worker(transport: SimulatedTransport) -> None:
        message = np.zeros(1)
        transport.exchange([(1 - transport.rank, message)], [(1 - transport.rank, np.empty(1))]).wait()

    with pytest.raises(DeadlockError, match=r"1 of 2 ranks wait forever. rank 1 waits for 8 bytes from rank 0"):
        simulate(worker, 2, faults=[Drop(sender=0)])


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Delay(-1.0), "seconds must be finite and >= 0"),
        (lambda: Delay(inf), "seconds must be finite"),
        (lambda: Drop(probability=1.5), "probability must be between 0 and 1, got 1.5"),
        (lambda: Death(0), "a death needs exactly one of"),
        (lambda: Death(0, 1.0, in_repair=0), "a death needs exactly one of"),
        (lambda: Pause(0, 1.0, inf), "seconds must be finite"),
        (lambda: Slow(0, -1.0), "factor must be finite and >= 0"),
        (lambda: simulate(listen, 2, notice_seconds=-1.0), "notice_seconds must be finite and >= 0"),
        (lambda: simulate(listen, 2, faults=[Slow(2, 1.0)]), "there is no rank 2"),
        (lambda: simulate(listen, 2, faults=[Drop(sender=2)]), "there is no rank 2, expected 0 to 1"),
        (lambda: simulate(listen, 2, faults=[Death(-1, 1.0)]), "there is no rank -1"),
    ],
)
def test_faults_that_cannot_be_are_refused(make: Callable[[], object], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        make()
