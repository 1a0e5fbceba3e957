"""Messages in rounds over collectives, on an engine made of threads: what holds whatever Horovod does.

``tests/ranks`` run over the real one.
"""

import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
from thread_binding import Coordinator, ThreadBinding

from lentando.comm import pieces
from lentando.comm.collectives import plan_reduction
from lentando.comm.dtypes import numpy_dtype
from lentando.comm.errors import TransportError
from lentando.comm.reductions.backend import BackendReduction
from lentando.comm.testing import check_transport
from lentando.comm.transports.horovod import HorovodTransport


def on_each_rank(size: int, function: Callable[[HorovodTransport], Any], seconds: float = 60.0) -> list[Any]:
    """The results by rank. The first error is raised here; the others see a failure of Horovod's."""
    coordinator = Coordinator(size)
    results: list[Any] = [None] * size
    errors: list[Exception] = []

    def run(rank: int) -> None:
        try:
            transport = HorovodTransport(ThreadBinding(coordinator, rank))
            results[rank] = function(transport)
            transport.close()
        except Exception as error:  # noqa: BLE001 - raised below
            errors.append(error)
            coordinator.failure = coordinator.failure or f"rank {rank} has failed"

    threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in range(size)]
    deadline = time.monotonic() + seconds
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(max(0.0, deadline - time.monotonic()))
    if errors:
        raise errors[0]
    assert not any(thread.is_alive() for thread in threads), "the ranks wait for each other"
    return results


@pytest.mark.slow
@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_promises_of_a_transport_are_kept(size: int) -> None:
    on_each_rank(size, check_transport)


@pytest.mark.slow
def test_promises_are_kept_when_rounds_and_collectives_are_cut_into_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LONGEST_BYTES", 200_000)
    on_each_rank(3, check_transport)


def test_two_ranks_exchange_while_a_third_computes() -> None:
    """And takes part in no exchange at all, nor in another collective."""
    exchanged = threading.Event()

    def work(transport: HorovodTransport) -> bool:
        if transport.rank == 2:
            return exchanged.wait(20)
        for step in range(20):
            received = np.empty(3)
            peer = 1 - transport.rank
            transport.exchange([(peer, np.full(3, float(step)))], [(peer, received)]).wait()
            assert received.tolist() == [step] * 3
        exchanged.set()
        return True

    assert on_each_rank(3, work) == [True] * 3


def test_message_arrives_while_its_receiver_waits_in_a_collective() -> None:
    def work(transport: HorovodTransport) -> list[float]:
        received = np.zeros(2)
        if transport.rank == 0:
            transport.exchange([(1, np.ones(2))], []).wait()
            answer = np.zeros(1)
            transport.exchange([], [(1, answer)]).wait()  # before it comes to the barrier
        else:
            request = transport.exchange([(0, np.ones(1))], [(0, received)])
            transport.barrier()
            request.wait()
            return received.tolist()
        transport.barrier()
        return []

    assert on_each_rank(2, work) == [[], [1.0, 1.0]]


def test_nothing_crosses_between_exchanges() -> None:
    def work(transport: HorovodTransport) -> int:
        peer = 1 - transport.rank
        transport.exchange([(peer, np.ones(1))], [(peer, np.empty(1))]).wait()
        transport.barrier()
        performed, before = transport._binding.coordinator.performed, -1
        while before != (before := len(performed)):  # the round that was in flight ends
            time.sleep(0.2)
        time.sleep(0.3)
        count = len(performed) - before
        transport.barrier()  # before either leaves, which takes a round
        return count

    assert on_each_rank(2, work) == [0, 0]


def test_quiet_of_the_bells_is_shorter_than_horovods_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOROVOD_STALL_CHECK_TIME_SECONDS", "0.3")

    def work(transport: HorovodTransport) -> bool:
        """Whether there was a round in each 0.3 s or less, but not in less than 0.1 s."""
        performed = transport._binding.coordinator.performed
        transport.barrier()
        before, began = performed.count("lentando.round"), time.monotonic()
        time.sleep(0.95)
        rounds, seconds = performed.count("lentando.round") - before, time.monotonic() - began
        return seconds / 0.3 - 1 <= rounds <= seconds / 0.1 + 3  # and one or two when others leave

    assert on_each_rank(3, work) == [True] * 3


def test_message_that_was_sent_arrives_though_the_sender_closes_at_once() -> None:
    def work(transport: HorovodTransport) -> float:
        if transport.rank == 0:
            transport.exchange([(1, np.full(1, 7.0))], [])
            return 0.0
        received = np.zeros(1)
        request = transport.exchange([], [(0, received)])
        time.sleep(0.1)
        request.wait()
        return float(received[0])

    assert on_each_rank(2, work) == [0.0, 7.0]


def test_failure_of_the_backend_reaches_those_who_wait() -> None:
    def work(transport: HorovodTransport) -> None:
        if transport.rank == 0:
            time.sleep(0.1)
            transport._binding.coordinator.failure = "Horovod has been shut down"
            return
        with pytest.raises(TransportError, match="Horovod has been shut down"):
            transport.exchange([], [(0, np.empty(1))]).wait()
        with pytest.raises(TransportError, match="Horovod has been shut down"):
            transport.barrier()

    on_each_rank(2, work)


def test_message_longer_than_its_receive_is_an_error_of_the_receiver() -> None:
    def work(transport: HorovodTransport) -> None:
        peer = 1 - transport.rank
        sending = transport.exchange([(peer, np.zeros(8))], [])
        receiving = transport.exchange([], [(peer, np.zeros(2))])
        with pytest.raises(TransportError, match="a message of 64 bytes met a receive of 16"):
            receiving.wait()
        sending.wait()
        received = np.zeros(1)
        transport.exchange([(peer, np.ones(1))], [(peer, received)]).wait()
        assert received[0] == 1

    on_each_rank(2, work)


def test_no_call_of_horovods_moves_more_than_the_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pieces, "LONGEST_BYTES", 1000)

    def work(transport: HorovodTransport) -> list[int]:
        engine, moved = transport._binding, list[int]()

        def counted(call: Callable[..., Any], operation: str, memory: Any, *arguments: Any) -> Any:
            moved.append(memory.nbytes)
            return call(operation, memory, *arguments)

        for name in ("allreduce", "broadcast", "allgather", "alltoall"):
            monkeypatch.setattr(engine, name, partial(counted, getattr(engine, name)))
        peer, own = 1 - transport.rank, np.arange(1000.0) + transport.rank
        received = np.empty(1000)
        transport.exchange([(peer, own)], [(peer, received)]).wait()
        assert np.array_equal(received, np.arange(1000.0) + peer)
        assert np.array_equal(transport.allgather(own), np.stack([np.arange(1000.0), np.arange(1000.0) + 1]))
        transport.allreduce(own)
        assert np.array_equal(own, 2 * np.arange(1000.0) + 1)
        transport.broadcast(own, 1)
        return moved

    for moved in on_each_rank(2, work):
        assert max(moved) <= 1000 + 3 * 8  # a message in a round of its own has a header


def test_arrays_that_are_read_only_are_only_read() -> None:
    def work(transport: HorovodTransport) -> tuple[Any, ...]:
        array = np.arange(3.0)
        array.flags.writeable = False
        if transport.rank == 0:
            transport.broadcast(array)
        received = np.empty(3)
        if transport.rank == 1:
            transport.broadcast(received)
        with pytest.raises(TransportError, match="writes to a read-only array: give it a copy"):
            transport.allreduce(array)
        transport.exchange([(transport.rank, array)], [(transport.rank, own := np.empty(3))]).wait()
        return transport.allgather(array).tolist(), own.tolist(), received.tolist()

    first, second = on_each_rank(2, work)
    expected = [0.0, 1.0, 2.0]
    assert first[:2] == second[:2] == ([expected, expected], expected)
    assert second[2] == expected


def test_averages_are_left_to_the_backend_however_large() -> None:
    large = np.zeros(2**26, np.uint8)
    assert on_each_rank(2, lambda transport: type(plan_reduction(transport, large))) == [BackendReduction] * 2


def test_ranks_that_call_different_collectives_get_an_error() -> None:
    def work(transport: HorovodTransport) -> str:
        with pytest.raises(TransportError) as error:
            transport.barrier() if transport.rank else transport.broadcast(np.zeros(3))
        return str(error.value)

    assert all("ask lentando.collective for" in words for words in on_each_rank(2, work))


@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16", "uint32", "uint64", "float16", "bfloat16"])
@pytest.mark.parametrize("op", ["sum", "min", "max"])
def test_dtypes_that_horovod_does_not_reduce_are_reduced_in_wider_ones(dtype: str, op: Any) -> None:
    def work(transport: HorovodTransport) -> list[float]:
        array = np.array([1, 100]).astype(numpy_dtype(dtype)) + transport.rank
        array = array.astype(numpy_dtype(dtype))
        if op != "sum" and dtype == "uint64":
            with pytest.raises(TransportError, match=r"no all-reduce \(.*\) for uint64"):
                transport.allreduce(array, op)
            return []
        transport.allreduce(array, op)
        assert array.dtype == numpy_dtype(dtype)
        return array.astype(float).tolist()

    found = on_each_rank(2, work)
    with np.errstate(over="ignore"):
        total = (np.array([1, 100]) * 2 + 1).astype(numpy_dtype(dtype)).astype(float).tolist()
    expected = {"sum": total, "min": [1.0, 100.0], "max": [2.0, 101.0]}[op]
    assert found == ([[], []] if op != "sum" and dtype == "uint64" else [expected] * 2)
