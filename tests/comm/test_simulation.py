"""The simulator: MPI's rules for messages, the lowest clock first, the same run every time."""

from math import inf
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from lentando.comm.simulation import (
    Compute,
    Network,
    Sent,
    SimulatedTransport,
    simulate,
)
from lentando.comm.transport import Transport

# Powers of two, so that sums and quotients of times are exact.
LATENCY, BANDWIDTH = 2.0**-14, 2.0**20
NETWORK = Network(LATENCY, BANDWIDTH)


def swap(transport: Transport, peer: int, value: float, tag: int = 0) -> float:
    """Send ``value`` to ``peer`` and return what comes from there."""
    received = np.empty(1)
    transport.exchange([(peer, np.array([value], np.float64))], [(peer, received)], tag).wait()
    return float(received[0])


def test_is_a_transport() -> None:
    def worker(transport: SimulatedTransport) -> bool:
        return isinstance(transport, Transport)

    assert simulate(worker, 2) == [True, True]


def test_results_come_by_rank() -> None:
    assert simulate(lambda transport: (transport.rank, transport.size), 3) == [(0, 3), (1, 3), (2, 3)]
    assert simulate(lambda transport: swap(transport, 1 - transport.rank, transport.rank), 2) == [1, 0]


def test_nodes_hold_local_size_ranks_and_the_last_one_the_rest() -> None:
    places = simulate(lambda transport: (transport.local_rank, transport.local_size), 5, local_size=2)
    assert places == [(0, 2), (1, 2), (0, 2), (1, 2), (0, 1)]


def test_streams_of_different_tags_do_not_mix() -> None:
    def worker(transport: SimulatedTransport) -> list[float]:
        first, second = np.empty(1), np.empty(1)
        peer = 1 - transport.rank
        sends = [transport.exchange([(peer, np.array([float(tag)]))], [], tag) for tag in (7, 8)]
        late = transport.exchange([], [(peer, second)], 8)
        early = transport.exchange([], [(peer, first)], 7)
        for request in (late, early, *sends):
            request.wait()
        return [float(first[0]), float(second[0])]

    assert simulate(worker, 2) == [[7, 8], [7, 8]]


def test_a_rank_may_send_to_itself() -> None:
    assert simulate(lambda transport: swap(transport, 0, 5), 1) == [5]


def test_traffic_is_counted() -> None:
    def worker(transport: SimulatedTransport) -> tuple[int, int, int]:
        swap(transport, 1 - transport.rank, 0)
        transport.allreduce(np.zeros(4))
        transport.broadcast(np.zeros(3), root=1)
        transport.allgather(np.zeros(2))
        transport.barrier()
        traffic = transport.traffic
        return traffic.messages, traffic.collectives, traffic.bytes_sent

    assert simulate(worker, 2) == [(1, 4, 8 + 32 + 16), (1, 4, 8 + 32 + 24 + 16)]


def test_always_the_rank_with_the_lowest_clock_continues() -> None:
    log: list[tuple[float, int]] = []

    def worker(transport: SimulatedTransport) -> None:
        for _ in range(30):
            log.append((transport.clock(), transport.rank))
            transport.compute()

    simulate(worker, 4, compute=Compute(1.0, "exponential"))
    assert log == sorted(log)
    log.clear()
    simulate(worker, 4, compute=Compute(1.0))
    assert log == sorted(log)  # ties by rank
    assert len(log) == 4 * 30


def test_ranks_that_are_woken_together_continue_by_rank() -> None:
    order: list[int] = []

    def worker(transport: SimulatedTransport) -> None:
        transport.compute(float(7 * transport.rank % 5))  # they come as 0, 3, 1, 4, 2
        transport.barrier()
        order.append(transport.rank)

    simulate(worker, 5)
    assert order == [0, 1, 2, 3, 4]


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 6), st.integers(0, 1000), st.floats(0, 2), st.booleans())
def test_the_same_seed_gives_the_same_run_and_another_seed_another(
    size: int, seed: int, jitter_seconds: float, reordering: bool
) -> None:
    def run(seed: int) -> tuple[list[Sent], list[Any]]:
        log: list[Sent] = []
        network = Network(0.1, 1e6, 0.01 + jitter_seconds, reordering=reordering)
        results = simulate(
            racing, size, network=network, compute=Compute(0.5, "exponential"), seed=seed, observe=log.append
        )
        return log, results

    assert run(seed) == run(seed)
    assert run(seed) != run(seed + 1)


def racing(transport: SimulatedTransport) -> tuple[float, list[float]]:
    """Steps of random length; takes messages when they happen to be there."""
    mailbox, taken, pending = float(transport.rank), [], []
    for _ in range(6):
        transport.compute()
        received = np.empty(1)
        peers = [((transport.rank + 1) % transport.size, np.array([mailbox]))]
        pending.append((transport.exchange(peers, [((transport.rank - 1) % transport.size, received)]), received))
        while pending and pending[0][0].test():
            mailbox += float(pending.pop(0)[1][0])
            taken.append(transport.clock())
    for request, received in pending:
        request.wait()
        mailbox += float(received[0])
    return mailbox, taken


def test_a_receive_is_filled_on_arrival_and_not_before() -> None:
    def worker(transport: SimulatedTransport) -> list[float]:
        if transport.rank == 0:
            transport.exchange([(1, np.array([3.0]))], []).wait()
            return []
        received = np.array([1.0])
        request = transport.exchange([], [(0, received)])
        seen = [float(received[0])]
        transport.compute(0.5)
        seen += [float(received[0]), request.test()]
        transport.compute(1.0)
        seen += [float(received[0]), request.test()]
        return seen

    seen = simulate(worker, 2, network=Network(1.0, inf))[1]
    assert np.isnan(seen[0])
    assert np.isnan(seen[1])
    assert seen[2:] == [False, 3.0, True]
    assert simulate(worker, 2, network=Network(1.0, inf), check_buffers=False)[1] == [1.0, 1.0, False, 3.0, True]


def test_polling_lets_time_pass_until_the_message_has_arrived() -> None:
    def worker(transport: SimulatedTransport) -> float:
        if transport.rank == 0:
            transport.compute(2.0)
            transport.exchange([(1, np.zeros(1))], []).wait()
            return transport.clock()
        request = transport.exchange([], [(0, np.empty(1))])
        while not request.test():
            pass
        return transport.clock()

    assert simulate(worker, 2, network=Network(1.0, inf)) == [2.0, 3.0]


def test_polling_for_a_send_ends_when_it_has_left() -> None:
    def worker(transport: SimulatedTransport) -> float:
        if transport.rank == 0:
            request = transport.exchange([(1, np.zeros(2**17))], [])
            while not request.test():
                pass
        else:
            transport.exchange([], [(0, np.empty(2**17))]).wait()
        return transport.clock()

    assert simulate(worker, 2, network=NETWORK) == [1.0, 1.0 + LATENCY]


def test_a_simulation_within_a_simulation() -> None:
    def worker(transport: SimulatedTransport) -> list[float]:
        inner = simulate(lambda inside: swap(inside, 1 - inside.rank, 10 * transport.rank + inside.rank), 2)
        return [swap(transport, 1 - transport.rank, value) for value in inner]

    assert simulate(worker, 2) == [[11, 10], [1, 0]]
