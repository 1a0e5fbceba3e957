"""What goes wrong is reported: which rank, what it waits for, where, and what to do; nothing hangs."""

import inspect
from collections.abc import Callable
from math import inf

import numpy as np
import pytest

from lentando.comm.errors import (
    ConfigurationError,
    DeadlockError,
    SimulationError,
    TransportError,
)
from lentando.comm.simulation import (
    Compute,
    Link,
    Network,
    SharedLink,
    SimulatedTransport,
    simulate,
)
from lentando.comm.transport import Transport

INSTANT = Network(0.0, inf)


def swap(transport: Transport, peer: int, value: float, tag: int = 0) -> float:
    """Send ``value`` to ``peer`` and return what comes from there."""
    received = np.empty(1)
    transport.exchange([(peer, np.array([value], np.float64))], [(peer, received)], tag).wait()
    return float(received[0])


def test_ranks_that_poll_for_ever_are_a_deadlock() -> None:
    def worker(transport: SimulatedTransport) -> None:
        request = transport.exchange([], [((transport.rank + 1) % 3, np.empty(1))])
        while not request.test():
            pass

    with pytest.raises(
        DeadlockError, match=r"3 of 3 ranks wait forever.*rank 2 waits for 8 bytes from rank 0 \(tag 0\)"
    ):
        simulate(worker, 3)


def test_a_deadlock_reports_who_waits_for_what_and_where() -> None:
    def receive_first(transport: SimulatedTransport) -> None:
        transport.exchange([], [(1 - transport.rank, np.empty(3))], 5).wait()
        transport.exchange([(1 - transport.rank, np.zeros(3))], [], 5).wait()

    line = inspect.getsourcelines(receive_first)[1] + 1
    with pytest.raises(DeadlockError) as caught:
        simulate(receive_first, 2)
    for rank in (0, 1):
        assert f"rank {rank} waits for 24 bytes from rank {1 - rank} (tag 5), in " in str(caught.value)
    assert str(caught.value).count(f"receive_first (test_simulation_errors.py:{line})") == 2


def test_a_deadlock_within_the_library_reports_who_called_it() -> None:
    def worker(transport: SimulatedTransport) -> None:
        from lentando.comm.reductions.ring import RingReduction

        if transport.rank == 0:
            RingReduction(transport, np.zeros(4)).all_reduce(mean=False)

    with pytest.raises(DeadlockError) as caught:
        simulate(worker, 2)
    text = str(caught.value)
    assert "1 of 2 ranks wait forever" in text
    assert "rank 0 waits for 16 bytes from rank 1 (tag 0), which has ended at 0 s, in " in text
    assert "_complete (ring.py:" in text
    assert ", called by " in text
    assert "worker (test_simulation_errors.py:" in text


def test_a_deadlock_reports_of_messages_that_no_rank_asked_for() -> None:
    def worker(transport: SimulatedTransport) -> None:
        message = [(1 - transport.rank, np.empty(1))]
        transport.exchange(message, message, 3 + transport.rank).wait()

    reason = r"from rank 1 \(tag 3\) \(arrived, but expected by no receive: 8 bytes from rank 1 \(tag 4\)\)"
    with pytest.raises(DeadlockError, match=reason):
        simulate(worker, 2)


def test_a_deadlock_reports_which_ranks_miss_a_collective() -> None:
    def worker(transport: SimulatedTransport) -> None:
        transport.barrier()
        if transport.rank == 1:
            transport.allreduce(np.zeros(3))
        elif transport.rank == 2:
            transport.exchange([], [(1, np.empty(1))]).wait()

    with pytest.raises(DeadlockError) as caught:
        simulate(worker, 3, network=INSTANT)
    text = str(caught.value)
    assert "rank 1 waits for ranks 0 and 2 to join allreduce, collective number 1 (rank 0 has ended at 0 s), in" in text
    assert "rank 2 waits for 8 bytes from rank 1 (tag 0), in" in text


def test_a_deadlock_of_many_ranks_names_some() -> None:
    with pytest.raises(DeadlockError, match=r"63 of 64 ranks.*and 55 more ranks$"):
        simulate(lambda transport: transport.rank and transport.barrier(), 64)


def test_a_program_that_relies_on_buffered_sends_is_found_when_asked() -> None:
    def send_first(transport: SimulatedTransport) -> float:
        peer, received = 1 - transport.rank, np.empty(1)
        transport.exchange([(peer, np.array([float(transport.rank)]))], []).wait()
        transport.exchange([], [(peer, received)]).wait()
        return float(received[0])

    assert simulate(send_first, 2) == [1, 0]
    with pytest.raises(DeadlockError, match=r"rank 0 waits for rank 1 to receive a message \(tag 0\)"):
        simulate(send_first, 2, network=Network(buffered=False))
    assert simulate(lambda transport: swap(transport, 1 - transport.rank, 2), 2, network=Network(buffered=False)) == [
        2,
        2,
    ]


def test_an_exception_ends_the_simulation_with_its_rank_and_lets_the_others_clean_up() -> None:
    cleaned: list[int] = []

    def worker(transport: SimulatedTransport) -> None:
        try:
            transport.compute(1.0 + transport.rank)
            if transport.rank == 1:
                raise KeyError("no such thing")
            transport.barrier()
        finally:
            cleaned.append(transport.rank)
            if transport.rank != 1:
                transport.compute(1.0)  # any rank that is ended cannot continue
                cleaned.append(-1)

    with pytest.raises(SimulationError, match=r"^rank 1 failed at 2 s: KeyError: 'no such thing'$") as caught:
        simulate(worker, 4)
    assert isinstance(caught.value.__cause__, KeyError)
    assert sorted(cleaned) == [0, 1, 2, 3]


def test_abort_ends_the_simulation() -> None:
    def worker(transport: SimulatedTransport) -> None:
        if transport.rank == 2:
            transport.abort(9)
        transport.barrier()

    with pytest.raises(SimulationError, match="rank 2 ended the job with status 9"):
        simulate(worker, 3)


def test_ctrl_c_is_not_a_failure_of_a_rank() -> None:
    def worker(transport: SimulatedTransport) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        simulate(worker, 2)


def test_messages_and_receives_of_different_sizes_are_an_error() -> None:
    def worker(transport: SimulatedTransport) -> None:
        if transport.rank == 0:
            transport.exchange([(1, np.zeros(3))], []).wait()
        else:
            transport.exchange([], [(0, np.empty(2))]).wait()

    expected = r"rank 1 failed.*rank 1 expects 16 bytes from rank 0 \(tag 0\), but the message has 24 bytes"
    with pytest.raises(SimulationError, match=expected) as caught:
        simulate(worker, 2)
    assert isinstance(caught.value.__cause__, TransportError)


def test_changing_an_array_while_it_is_sent_is_an_error() -> None:
    def worker(transport: SimulatedTransport) -> float:
        data, received = np.zeros(2), np.empty(2)
        request = transport.exchange([(1 - transport.rank, data)], [(1 - transport.rank, received)])
        if transport.rank == 1:
            data[0] = 1
        request.wait()
        return float(received[0])

    with pytest.raises(SimulationError, match="rank 1 changed an array of 16 bytes while it was being sent to rank 0"):
        simulate(worker, 2)
    assert simulate(worker, 2, check_buffers=False) == [0, 0]  # the bytes are taken when the exchange starts


@pytest.mark.parametrize(
    ("misuse", "error", "reason"),
    [
        (
            lambda t: t.exchange([(2, np.zeros(1))], []),
            TransportError,
            "exchange with rank 2: expected a rank from 0 to 1",
        ),
        (lambda t: t.exchange([], [(-1, np.zeros(1))]), TransportError, "exchange with rank -1"),
        (lambda t: t.exchange([], [], 32768), ConfigurationError, "tag must be between 0 and 32767, got 32768"),
        (lambda t: t.exchange([(1, np.zeros((4, 4))[:, 1])], []), ConfigurationError, "C-contiguous"),
        (lambda t: t.allreduce(np.zeros((4, 4))[:, 1]), ConfigurationError, "C-contiguous"),
        (lambda t: t.broadcast(np.zeros(1), 2), TransportError, "broadcast from rank 2"),
        (lambda t: t.compute(-1.0), ConfigurationError, "seconds must be >= 0, got -1.0"),
    ],
)
def test_misuse_is_refused(misuse: Callable[[SimulatedTransport], object], error: type[Exception], reason: str) -> None:
    with pytest.raises(SimulationError, match=reason) as caught:
        simulate(misuse, 2)
    assert isinstance(caught.value.__cause__, error)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        (lambda: Network(-1.0), "latency_seconds must be finite and >= 0, got -1.0"),
        (lambda: Network(inf), "latency_seconds must be finite"),
        (lambda: Network(0.0, 0.0), "bandwidth_bytes_per_second must be > 0"),
        (lambda: Link(0.0, 1.0, -1.0), "jitter_seconds must be finite and >= 0"),
        (lambda: SharedLink(-1.0), "bandwidth_bytes_per_second must be > 0"),
        (lambda: Compute(-1.0), "mean_seconds must be finite and >= 0"),
        (lambda: Compute(1.0, "normal"), "distribution must be 'constant', .*got 'normal'"),  # type: ignore[arg-type]
        (lambda: Compute(distribution="trace"), "go together"),
        (lambda: Compute(trace=[1.0]), "go together"),
        (lambda: Compute(1.0, "trace", trace=[1.0]), "leave mean_seconds out"),
        (lambda: Compute(distribution="trace", trace=[1.0, -1.0]), "trace must be finite and >= 0, got -1.0"),
        (lambda: Compute(1.0, stragglers={0: -2.0}), "stragglers must be finite and >= 0"),
        (lambda: Compute(1.0, variation=-1.0), "variation must be"),
        (lambda: simulate(print, 0), "size and local_size must be >= 1"),
        (lambda: simulate(print, 2, local_size=0), "size and local_size must be >= 1"),
        (lambda: simulate(print, 2, compute=Compute(1.0, stragglers={2: 2.0})), "stragglers: there is no rank 2"),
        (lambda: simulate(print, 2, network=Network(links={(0, 2): Link(0, 1)})), r"link \(0, 2\)"),
        (lambda: simulate(lambda transport, model: None, 2), "takes the transport or nothing.*transport, model"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: Callable[[], object], reason: str) -> None:
    with pytest.raises(ConfigurationError, match=reason):
        settings()
