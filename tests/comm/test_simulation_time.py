"""Virtual time is what the network model and the compute model say, bit-identically where that can be."""

from itertools import pairwise
from math import inf

import numpy as np
import pytest

from lentando.comm.simulation import (
    Compute,
    Link,
    Network,
    Sent,
    SharedLink,
    SimulatedTransport,
    simulate,
)

# Powers of two, so that sums and quotients of times are exact.
LATENCY, BANDWIDTH = 2.0**-14, 2.0**20
NETWORK = Network(LATENCY, BANDWIDTH)
INSTANT = Network(0.0, inf)


def test_a_message_takes_latency_and_bytes_over_bandwidth() -> None:
    def worker(transport: SimulatedTransport) -> float:
        data = np.zeros(2**17)
        if transport.rank == 0:
            transport.exchange([(1, data)], []).wait()
        else:
            transport.exchange([], [(0, data)]).wait()
        return transport.clock()

    assert simulate(worker, 2, network=NETWORK) == [1.0, 1.0 + LATENCY]  # the sender is done when it has left


@pytest.mark.parametrize("size", [2, 3, 8, 33])
def test_one_peer_exchange_takes_the_same_time_in_any_world(size: int) -> None:
    """O62: latency + S / bandwidth, however many ranks swap with however many others."""

    def worker(transport: SimulatedTransport) -> float:
        data, received = np.zeros(2**10), np.empty(2**10)
        for hop in (1, 2):
            after, before = (transport.rank + hop) % size, (transport.rank - hop) % size
            transport.exchange([(after, data)], [(before, received)]).wait()
        return transport.clock()

    assert simulate(worker, size, network=NETWORK) == [2 * (LATENCY + 2**13 / BANDWIDTH)] * size


@pytest.mark.parametrize("direction", ["from", "to"])
def test_messages_from_or_to_one_rank_share_its_port(direction: str) -> None:
    def worker(transport: SimulatedTransport) -> float:
        data = np.zeros(2**10)
        others = [(rank, data.copy()) for rank in range(1, 4)]
        if transport.rank == 0:
            request = transport.exchange(others, []) if direction == "from" else transport.exchange([], others)
        else:
            message = [(0, data)]
            request = transport.exchange([], message) if direction == "from" else transport.exchange(message, [])
        request.wait()
        return transport.clock()

    each = 2**13 / BANDWIDTH
    times = simulate(worker, 4, network=NETWORK)
    assert sorted(times[1:]) == [each * k + (LATENCY if direction == "from" else 0) for k in (1, 2, 3)]
    assert times[0] == 3 * each + (LATENCY if direction == "to" else 0)


def test_flows_on_a_shared_link_have_its_bandwidth_together() -> None:
    def worker(transport: SimulatedTransport) -> float:
        data = np.zeros(2**10)
        if transport.rank < 4:
            transport.exchange([(transport.rank + 4, data)], []).wait()
        else:
            transport.exchange([], [(transport.rank - 4, data)]).wait()
        return transport.clock()

    each = 2**13 / BANDWIDTH
    uplink = SharedLink(BANDWIDTH / 2, links=[(0, 4), (1, 5), (2, 6)])
    times = simulate(worker, 8, network=Network(LATENCY, BANDWIDTH, shared=[uplink]))
    assert times[7] == LATENCY + each  # the pair that does not take it
    assert max(times[4:]) == LATENCY + 3 * 2 * each
    bus = SharedLink(BANDWIDTH)
    assert max(simulate(worker, 8, network=Network(LATENCY, BANDWIDTH, shared=[bus]))) == LATENCY + 4 * each


def test_links_that_differ_are_wires_of_their_own() -> None:
    def worker(transport: SimulatedTransport) -> float:
        data, received = np.zeros(2**10), np.empty(2**10)
        transport.exchange([(transport.rank ^ 1, data)], [(transport.rank ^ 1, received)]).wait()
        return transport.clock()

    each = 2**13 / BANDWIDTH
    slow = {(2, 3): Link(1.0, BANDWIDTH / 4)}
    assert simulate(worker, 4, network=Network(LATENCY, BANDWIDTH, links=slow)) == [
        LATENCY + each,
        LATENCY + each,
        4 * each,  # what it receives arrives earlier, but what it sends has not left
        1.0 + 4 * each,
    ]
    fast = Network(LATENCY, BANDWIDTH, within_node=Link(0.0, 8 * BANDWIDTH))
    assert simulate(worker, 4, network=fast, local_size=2) == [each / 8] * 4
    assert simulate(worker, 4, network=fast, local_size=1) == [LATENCY + each] * 4


def stream(transport: SimulatedTransport, count: int = 200) -> list[float]:
    """Rank 0 sends 0, 1, 2, ... to rank 1, which returns them in the order of its receives."""
    requests = []
    buffers = [np.array([float(number)]) for number in range(count)]
    for buffer in buffers:
        message = [(1 - transport.rank, buffer)]
        requests.append(transport.exchange(message, []) if transport.rank == 0 else transport.exchange([], message))
    for request in requests:
        request.wait()
    return [float(buffer[0]) for buffer in buffers]


def test_jitter_delays_within_its_bound_and_keeps_the_order() -> None:
    log: list[Sent] = []
    _, received = simulate(stream, 2, network=Network(1.0, inf, 0.5), observe=log.append)
    assert received == list(range(200))
    late = [sent.arrives_at_seconds - sent.sent_at_seconds for sent in log]
    assert 1.0 <= min(late) <= max(late) <= 1.5
    assert late == sorted(late)  # all sent at once: each waits for the one before


def test_messages_overtake_within_the_jitter_if_asked_to() -> None:
    log: list[Sent] = []
    _, received = simulate(stream, 2, network=Network(1.0, inf, 0.5, reordering=True), observe=log.append)
    assert sorted(received) == list(range(200))
    assert received != list(range(200))
    by_arrival = sorted(range(200), key=lambda number: log[number].arrives_at_seconds)
    assert received == by_arrival
    assert np.mean([sent.arrives_at_seconds for sent in log]) == pytest.approx(1.25, abs=0.05)


def test_a_message_more_does_not_change_the_jitter_of_others() -> None:
    def arrivals(chatty: bool) -> list[float]:
        log: list[Sent] = []

        def worker(transport: SimulatedTransport) -> None:
            for _ in range(5):
                transport.exchange([(transport.rank, np.zeros(1))] * (1 + (chatty and transport.rank == 0)), [])

        simulate(worker, 2, network=Network(1.0, inf, 0.5, reordering=True), observe=log.append)
        return [sent.arrives_at_seconds for sent in log if sent.sender == 1]

    assert arrivals(chatty=True) == arrivals(chatty=False)
    assert len(set(arrivals(chatty=False))) == 5


def test_compute_times_follow_the_distribution() -> None:
    def worker(transport: SimulatedTransport) -> list[float]:
        clocks = [transport.clock()]
        for _ in range(4000):
            transport.compute()
            clocks.append(transport.clock())
        return [float(step) for step in np.diff(clocks)]

    constant = simulate(worker, 1, compute=Compute(0.25))[0]
    assert set(constant) == {0.25}
    exponential = simulate(worker, 1, compute=Compute(0.25, "exponential"))[0]
    assert np.mean(exponential) == pytest.approx(0.25, rel=0.05)
    assert np.std(exponential) == pytest.approx(0.25, rel=0.05)
    lognormal = simulate(worker, 1, compute=Compute(0.25, "lognormal", variation=0.4))[0]
    assert np.mean(lognormal) == pytest.approx(0.25, rel=0.03)
    assert np.std(lognormal) == pytest.approx(0.1, rel=0.1)
    assert np.mean(np.log(lognormal)) == pytest.approx(np.median(np.log(lognormal)), abs=0.02)
    trace = simulate(worker, 1, compute=Compute(distribution="trace", trace=[1, 2, 4]))[0]
    assert set(trace) == {1, 2, 4}
    assert all(following == {1: 2, 2: 4, 4: 1}[step] for step, following in pairwise(trace))


def test_ranks_draw_different_times_and_stragglers_longer_ones() -> None:
    def worker(transport: SimulatedTransport) -> float:
        for _ in range(10):
            transport.compute()
        return transport.clock()

    plain = simulate(worker, 4, compute=Compute(1.0, "exponential"))
    slowed = simulate(worker, 4, compute=Compute(1.0, "exponential", stragglers={2: 4.0}))
    assert len(set(plain)) == 4
    assert slowed == [pytest.approx(seconds * (4 if rank == 2 else 1)) for rank, seconds in enumerate(plain)]


def test_waiting_for_the_slowest_costs_a_harmonic_number() -> None:
    """O29: the maximum of m exponential times of mean y is y (1 + 1/2 + ... + 1/m) on average."""

    def worker(transport: SimulatedTransport) -> float:
        for _ in range(2000):
            transport.compute()
            transport.barrier()
        return transport.clock() / 2000

    harmonic = sum(1 / k for k in range(1, 9))
    (mean, *_) = simulate(worker, 8, network=INSTANT, compute=Compute(1.0, "exponential"))
    assert mean == pytest.approx(harmonic, rel=0.02)


def test_compute_takes_the_time_it_is_given() -> None:
    def worker(transport: SimulatedTransport) -> float:
        transport.compute(1.5)
        return transport.clock()

    assert simulate(worker, 1, compute=Compute(100.0)) == [1.5]


def test_an_exchange_runs_while_the_caller_computes() -> None:
    def worker(transport: SimulatedTransport) -> float:
        data, received = np.zeros(2**17), np.empty(2**17)
        request = transport.exchange([(1 - transport.rank, data)], [(1 - transport.rank, received)])
        transport.compute(0.75)
        request.wait()
        return transport.clock()

    assert simulate(worker, 2, network=NETWORK) == [1.0 + LATENCY] * 2
