"""The NCCL transport over a stand-in for NCCL (``matching_nccl``): no GPU is needed, and nothing of CUDA is tested."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import device_arrays
import numpy as np
import pytest
from matching_nccl import MatchingBinding, MatchingCommunicator, MatchingNCCL, run_ranks_on_devices

from lentando.comm.array_module import to_host
from lentando.comm.capabilities import BackendReduceScatter, takes_device_arrays
from lentando.comm.collectives import all_reduce, plan_reduction
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import ConfigurationError, LaunchError, TransportError
from lentando.comm.reductions.backend import BackendReduction, BackendShardedReduction
from lentando.comm.reductions.plan import RING_FROM_BYTES
from lentando.comm.reductions.ring import RingReduction
from lentando.comm.testing import ThreadTransport, check_device_arrays, check_transport, run_ranks
from lentando.comm.transport import Array, Message, Request, Traffic
from lentando.comm.transports.nccl import NCCLTransport
from lentando.comm.transports.nccl_binding import NCCLBinding

SIZES = [1, *(pytest.param(size, marks=pytest.mark.slow) for size in (2, 3, 4))]


@pytest.mark.parametrize("size", SIZES)
def test_host_memory_travels_as_over_any_transport(size: int) -> None:
    run_ranks_on_devices(size, check_transport)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("latency_seconds", [0.0, 0.002])
def test_device_arrays_travel(size: int, latency_seconds: float) -> None:
    def check(transport: NCCLTransport) -> None:
        assert takes_device_arrays(transport)
        assert isinstance(transport, BackendReduceScatter)
        check_device_arrays(transport, device_arrays.asarray)

    run_ranks_on_devices(size, check, latency_seconds=latency_seconds)


class WithoutWaiting(NCCLTransport):
    """Hands its arrays out before they have arrived."""

    def exchange(self, *arguments: Any, **options: Any) -> Request:
        super().exchange(*arguments, **options)
        return self._bootstrap.exchange([], [])


class TwoGroups(NCCLTransport):
    """First receives, then sends."""

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message], *rest: Any, **options: Any) -> Request:
        received = super().exchange([], receives, *rest, **options)
        super().exchange(sends, [], *rest, **options).wait()
        return received


class ByTag(NCCLTransport):
    """Keeps the messages of a tag back until others have gone, as if their order did not matter."""

    kept: tuple[Any, ...] = ()

    def exchange(self, sends: Any, receives: Any, tag: int = 0, *, overlap: bool = True) -> Request:
        if tag == 1 and self.rank == 0 and not self.kept:
            self.kept = sends, receives, tag
            return self._bootstrap.exchange([], [])
        request = super().exchange(sends, receives, tag, overlap=overlap)
        if self.kept:
            super().exchange(*self.kept)
        return request


class SumsOnly(NCCLTransport):
    def allreduce(self, array: Array, op: Any = "sum") -> None:
        super().allreduce(array, "sum")


class WrongHalf(NCCLTransport):
    def reduce_scatter(self, array: Array, out: Array) -> None:
        super().reduce_scatter(array, out)
        out += 1


class WithoutBytes(Traffic):
    def count_collective(self, bytes_sent: int) -> None:
        self.collectives += 1


class UncountedBytes(NCCLTransport):
    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.traffic = self._bootstrap.traffic = WithoutBytes()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mutant", "why"),
    [
        (WithoutWaiting, "a round's message"),
        (TwoGroups, "round in both directions: NCCL failed on rank .* a deadlock"),
        (ByTag, "rounds apart: NCCL failed on rank"),
        (SumsOnly, r"an allreduce \(min\)"),
        (WrongHalf, "this rank's shard of a reduce_scatter"),
        (UncountedBytes, "was counted as"),
    ],
)
def test_transport_that_breaks_a_promise_is_refused(mutant: type[NCCLTransport], why: str) -> None:
    nccl = MatchingNCCL(3, timeout_seconds=1.0, latency_seconds=0.02)

    def check(bootstrap: ThreadTransport) -> None:
        transport = mutant(bootstrap, MatchingBinding(nccl, bootstrap.rank))
        check_device_arrays(transport, device_arrays.asarray, timeout_seconds=3.0)

    with pytest.raises(AssertionError, match=why):
        run_ranks(3, check, timeout_seconds=5.0)


def test_transport_that_takes_no_device_arrays_is_distinguished() -> None:
    with pytest.raises(AssertionError, match="it does not take device arrays"):
        run_ranks(1, lambda transport: check_device_arrays(transport, device_arrays.asarray))


def test_ranks_whose_rounds_come_in_different_orders_get_an_error_and_no_hang() -> None:
    def cross(transport: NCCLTransport) -> None:
        arrays = [device_arrays.zeros(3) for _ in range(2)]
        transport.broadcast(arrays[0])
        peer = 1 - transport.rank
        rounds: list[Callable[[], Request]] = [
            lambda: transport.exchange([(peer, arrays[0])], []),
            lambda: transport.exchange([], [(peer, arrays[1])]),
        ]
        requests = [start() for start in rounds]  # both send first: neither is taken before it receives
        for request in requests:
            request.wait()

    with pytest.raises(TransportError, match=r"NCCL failed on rank \d: group 1 of rank \d: .* a deadlock"):
        run_ranks_on_devices(2, cross, timeout_seconds=2.0)


def test_asynchronous_error_is_raised_by_the_caller_that_waits_or_asks() -> None:
    def fail(transport: NCCLTransport) -> list[str]:
        array = device_arrays.zeros(3)
        transport.broadcast(array)
        communicator = transport._communicator
        assert isinstance(communicator, MatchingCommunicator)
        request = transport.exchange([], [(1 - transport.rank, array)])  # no rank sends
        assert not request.test()
        communicator.failure = "the network is down"
        messages = []
        for ask in (request.wait, request.test, lambda: transport.allreduce(array)):
            with pytest.raises(TransportError) as error:
                ask()
            messages.append(str(error.value))
        return messages

    for rank, messages in enumerate(run_ranks_on_devices(2, fail)):
        assert messages == [f"NCCL failed on rank {rank}: the network is down"] * 3


def test_exchange_keeps_what_it_sends_until_it_is_complete() -> None:
    def reuse(transport: NCCLTransport) -> list[float]:
        received = device_arrays.zeros(4)
        transport.broadcast(received)
        peer = 1 - transport.rank
        request = transport.exchange([(peer, device_arrays.zeros(4) + 7.0)], [(peer, received)])
        assert not request.test()
        assert received.tolist() == [0] * 4
        request.wait()
        assert request.test()
        return received.tolist()

    assert run_ranks_on_devices(2, reuse, latency_seconds=0.5) == [[7.0] * 4] * 2


def test_first_operation_must_be_one_of_all_ranks() -> None:
    def exchange(transport: NCCLTransport) -> None:
        transport.exchange([(0, device_arrays.zeros(1))], [(0, device_arrays.zeros(1))])

    with pytest.raises(TransportError, match="the first operation on arrays on a GPU must be a collective one"):
        run_ranks_on_devices(1, exchange)


def test_ranks_that_share_a_gpu_are_named_on_every_rank() -> None:
    def broadcast(transport: NCCLTransport) -> str:
        with pytest.raises(ConfigurationError) as error:
            transport.broadcast(device_arrays.zeros(1))
        return str(error.value)

    messages = run_ranks_on_devices(5, broadcast, devices=[0, 1, 0, 3, 1])
    assert len(set(messages)) == 1
    assert "one is used by ranks 0 and 2; another by ranks 1 and 4." in messages[0]


def test_array_on_another_gpu_than_the_first_is_refused() -> None:
    def elsewhere(transport: NCCLTransport) -> None:
        transport.broadcast(device_arrays.zeros(1))
        transport.allreduce(device_arrays.DeviceArray(np.zeros(1), device=3))

    with pytest.raises(TransportError, match="communicates for GPU 0, .* was given an array on GPU 3"):
        run_ranks_on_devices(1, elsewhere)


def test_what_is_missing_on_one_rank_is_an_error_on_all() -> None:
    class Lacking(MatchingBinding):
        def problem(self) -> str | None:
            return "this process sees no GPU" if self.device == 1 else None

    def start(bootstrap: ThreadTransport) -> str:
        with pytest.raises(LaunchError) as error:
            NCCLTransport(bootstrap, Lacking(MatchingNCCL(3, 1, 0), bootstrap.rank))
        return str(error.value)

    messages = set(run_ranks(3, start))
    assert len(messages) == 1
    assert "ranks 0 and 2: nothing is missing; rank 1: this process sees no GPU." in messages.pop()


def test_job_that_fails_ends_nccl_first_and_does_not_wait_for_it_forever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lentando.comm.transports.nccl.ABORT_SECONDS", 0.1)
    stuck = threading.Event()
    seen: list[str] = []

    def fail(transport: NCCLTransport) -> None:
        transport.broadcast(device_arrays.zeros(1))
        communicator: Any = transport._communicator
        abort = communicator.abort
        communicator.abort = lambda: (abort(), seen.append(communicator.closed), stuck.wait(20))
        with pytest.raises(SystemExit):
            transport.abort(3)

    started = time.perf_counter()
    with pytest.raises(TransportError, match="rank 0 ended the job with status 3"):
        run_ranks_on_devices(1, fail)
    assert time.perf_counter() - started < 19
    assert seen == ["aborted"]
    stuck.set()


def test_close_releases_nccl_and_the_transport_below() -> None:
    def close(transport: NCCLTransport) -> str:
        transport.broadcast(device_arrays.zeros(1))
        communicator: Any = transport._communicator
        transport.close()
        return str(communicator.closed)

    assert run_ranks_on_devices(2, close) == ["closed"] * 2


def test_what_this_machine_lacks_is_reported_in_words() -> None:
    problem = NCCLBinding().problem()
    if problem is None:
        pytest.skip("this machine has a GPU, and all that NCCL needs")
    assert any(words in problem for words in ("is not installed (pip install", "cannot be loaded", "sees no GPU"))


REDUCTIONS: dict[str, Callable[[Any, Array], Any]] = {
    "ring": RingReduction,
    "backend": BackendReduction,
    "halves": BackendShardedReduction,
}


@pytest.mark.parametrize("algorithm", REDUCTIONS)
@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, bfloat16, np.int64])
@pytest.mark.parametrize("elements", [0, 2, 11, 12])
@pytest.mark.parametrize("size", [1, 3])
def test_reductions_of_device_arrays_are_those_of_host_memory_bit_identically(
    algorithm: str, dtype: Any, elements: int, size: int
) -> None:
    """Halves are summed by the stand-in in the order of the ranks, as the backend of ``ThreadTransport`` does it."""

    def values(rank: int) -> Array:
        return (10 * np.random.default_rng(rank).normal(size=elements)).astype(dtype)

    def reduced(reduction: Any, buffer: Array) -> list[bytes]:
        before = to_host(buffer).tobytes()
        total = to_host(reduction.reduce_scatter())
        assert to_host(buffer).tobytes() == before
        by_rank = [total.tobytes()]
        reduction.all_reduce(mean=np.dtype(dtype).kind != "i")
        return [*by_rank, to_host(buffer).tobytes()]

    def on_device(transport: NCCLTransport) -> tuple[slice, list[bytes]]:
        buffer = device_arrays.asarray(values(transport.rank))
        transport.broadcast(device_arrays.zeros(1))
        reduction = REDUCTIONS[algorithm](transport, buffer)
        return reduction.shard, reduced(reduction, buffer)

    def on_host(transport: ThreadTransport) -> list[bytes]:
        buffer = values(transport.rank)
        return reduced(plan_reduction(transport, buffer, "ring" if algorithm == "ring" else "backend"), buffer)

    found, expected = run_ranks_on_devices(size, on_device), run_ranks(size, on_host)
    assert [mean for _, (_, mean) in found] == [mean for _, mean in expected]
    owned = [element for part, _ in found for element in range(part.start, part.stop)]
    assert owned == list(range(elements)) or algorithm != "halves"
    assert sorted(owned) == list(range(elements))
    if algorithm != "halves":  # which cuts elsewhere
        assert [total for _, (total, _) in found] == [total for total, _ in expected]


@pytest.mark.parametrize("algorithm", REDUCTIONS)
@pytest.mark.parametrize("elements", [0, 2, 11, 12])
def test_all_gather_hands_out_what_ranks_made_of_their_shards(algorithm: str, elements: int) -> None:
    def outer_step(transport: NCCLTransport) -> tuple[slice, list[float]]:
        buffer = device_arrays.zeros(elements, np.float32)
        transport.broadcast(device_arrays.zeros(1))
        reduction = REDUCTIONS[algorithm](transport, buffer)
        reduction.reduce_scatter()
        buffer[reduction.shard] = 100.0 + transport.rank
        reduction.all_gather()
        return reduction.shard, buffer.tolist()

    found = run_ranks_on_devices(4, outer_step)
    expected = np.empty(elements)
    for rank, (shard, _) in enumerate(found):
        expected[shard] = 100 + rank
    assert [values for _, values in found] == [expected.tolist()] * 4


@pytest.mark.slow
@pytest.mark.parametrize(("scatter_gather", "expected"), [(True, BackendShardedReduction), (False, BackendReduction)])
def test_auto_leaves_device_arrays_to_nccl_and_host_memory_to_what_it_was(scatter_gather: bool, expected: type) -> None:
    def plan(transport: NCCLTransport) -> tuple[type, type]:
        large = RING_FROM_BYTES["one node"]
        kinds = (
            plan_reduction(transport, array, scatter_gather=scatter_gather)
            for array in (device_arrays.zeros(large, np.uint8), np.zeros(large, np.uint8))
        )
        return tuple(map(type, kinds))  # type: ignore[return-value]

    assert run_ranks_on_devices(2, plan) == [(expected, RingReduction)] * 2


def test_engine_without_halves_is_refused_by_name() -> None:
    def plan(transport: ThreadTransport) -> None:
        BackendShardedReduction(transport, np.zeros(3, np.float32))

    with pytest.raises(ConfigurationError, match="transport 'threads' has no reduce-scatter of its own"):
        run_ranks(1, plan)


def test_all_reduce_of_a_matrix_on_a_device() -> None:
    def reduce(transport: NCCLTransport) -> list[float]:
        array = device_arrays.asarray(np.full((2, 3), transport.rank, np.float32))
        all_reduce(transport, array, mean=True)
        return array.tolist()

    assert run_ranks_on_devices(3, reduce) == [[[1.0] * 3] * 2] * 3


def test_halves_send_what_a_ring_sends() -> None:
    def sent(transport: NCCLTransport) -> int:
        buffer = device_arrays.zeros(12, np.float32)
        transport.broadcast(buffer)
        reduction = plan_reduction(transport, buffer, scatter_gather=True)
        before = transport.traffic.copy()
        reduction.reduce_scatter()
        reduction.all_gather()
        return transport.traffic.bytes_sent - before.bytes_sent

    assert run_ranks_on_devices(4, sent) == [2 * 3 * 48 // 4] * 4
