"""The library's own collectives, and the backend's, on simulated ranks: values, and the time that the model
promises.
"""

from math import nan

import numpy as np
import pytest
from ml_dtypes import bfloat16

from lentando.comm.agreement import Event, Intent, agree, ranks_where
from lentando.comm.collectives import all_reduce, plan_reduction
from lentando.comm.errors import MismatchError, SimulationError
from lentando.comm.objects import allgather_object, broadcast_object
from lentando.comm.reductions.ring import RingReduction, Segments
from lentando.comm.simulation import Compute, Link, Network, Sent, SharedLink, SimulatedTransport, simulate
from lentando.comm.transport import Array

LATENCY, BANDWIDTH = 2.0**-14, 2.0**20
NETWORK = Network(LATENCY, BANDWIDTH)


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 8, 13, 32, 64])
@pytest.mark.parametrize("elements", [3, 1003])
def test_ring_gives_every_rank_the_exact_sum(size: int, elements: int) -> None:
    """O60, with stragglers and jitter: whatever the timing."""

    def worker(transport: SimulatedTransport) -> bytes:
        buffer: Array = (np.arange(elements, dtype=np.float32) + transport.rank) % 97
        transport.compute()
        RingReduction(transport, buffer, Segments(64)).all_reduce(mean=False)
        return buffer.tobytes()

    expected = sum((np.arange(elements, dtype=np.float32) + rank) % 97 for rank in range(size))
    results = simulate(worker, size, network=Network(1e-4, 1e6, 1e-3), compute=Compute(1e-3, "exponential"))
    assert set(results) == {np.asarray(expected, np.float32).tobytes()}


@pytest.mark.parametrize("dtype", [np.float32, np.float16, bfloat16])
def test_ring_is_equal_bit_identically_on_every_rank_when_it_rounds(dtype: type) -> None:
    def worker(transport: SimulatedTransport) -> bytes:
        buffer: Array = np.random.default_rng(transport.rank).normal(size=100).astype(dtype)
        RingReduction(transport, buffer).all_reduce(mean=True)
        return buffer.tobytes()

    assert len(set(simulate(worker, 7))) == 1


@pytest.mark.parametrize("size", [2, 4, 8, 16, 64])
def test_ring_takes_the_time_of_the_alpha_beta_model(size: int) -> None:
    """O62 and O59: 2(n - 1)(latency + S / (n bandwidth)), exactly, in 2(n - 1) messages per rank."""
    elements = 2**12
    log: list[Sent] = []

    def worker(transport: SimulatedTransport) -> float:
        RingReduction(transport, np.ones(elements, np.float32)).all_reduce(mean=False)
        return transport.clock()

    model = 2 * (size - 1) * (LATENCY + 4 * elements / (size * BANDWIDTH))
    assert simulate(worker, size, network=NETWORK, observe=log.append) == [model] * size
    assert len(log) == size * 2 * (size - 1)
    assert sum(sent.size_bytes for sent in log) == 2 * (size - 1) * 4 * elements  # O58


def test_segments_hide_latency_but_not_bandwidth() -> None:
    size, elements = 4, 2**14

    def worker(transport: SimulatedTransport) -> float:
        RingReduction(transport, np.ones(elements, np.float32), Segments(2**12)).all_reduce(mean=False)
        return transport.clock()

    moved = 2 * (size - 1) * 4 * elements / (size * BANDWIDTH)
    (seconds, *_) = simulate(worker, size, network=NETWORK)
    assert moved < seconds < moved + 2 * (size - 1) * LATENCY


def test_a_straggler_delays_the_ring_by_what_it_is_late() -> None:
    def worker(transport: SimulatedTransport) -> float:
        transport.compute()
        RingReduction(transport, np.ones(64, np.float32)).all_reduce(mean=False)
        return transport.clock()

    def seconds(**stragglers: float) -> float:
        slower = {int(rank[1:]): factor for rank, factor in stragglers.items()}
        return max(map(float, simulate(worker, 8, network=NETWORK, compute=Compute(1.0, stragglers=slower))))

    assert seconds(r3=2.0) == seconds() + 1.0


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_planned_reductions_give_the_mean(algorithm: str) -> None:
    def worker(transport: SimulatedTransport) -> list[float]:
        buffer = np.full(10, float(transport.rank))
        reduction = plan_reduction(transport, buffer, algorithm)  # type: ignore[arg-type]
        reduction.all_reduce(mean=True)
        buffer += 1
        total = reduction.reduce_scatter()
        buffer[reduction.shard] = total
        reduction.all_gather()
        return [float(value) for value in buffer]

    assert simulate(worker, 5) == [[15.0] * 10] * 5


def test_engine_collectives_compute_what_they_say() -> None:
    def worker(transport: SimulatedTransport) -> None:
        rank, size = transport.rank, transport.size
        for op, expected in (("sum", 10.0), ("min", 0.0), ("max", 4.0)):
            array = np.full((2, 3), float(rank))
            transport.allreduce(array, op)  # type: ignore[arg-type]
            assert (array == expected).all()
        integers = np.full(4, rank, np.int16)
        transport.broadcast(integers, root=3)
        assert (integers == 3).all()
        gathered = transport.allgather(np.array([[rank, 2.0 * rank]]))
        assert gathered.shape == (size, 1, 2)
        assert (gathered[:, 0, 0] == range(size)).all()
        gathered[:] = nan  # every rank has its own
        transport.barrier()
        assert (transport.allgather(np.array([rank])).ravel() == range(size)).all()

    simulate(worker, 5, compute=Compute(1.0, "exponential"))


def test_engine_sums_in_the_order_of_ranks() -> None:
    """1e16 + 1 - 1e16 is 0 from left to right, in any order."""

    def worker(transport: SimulatedTransport) -> float:
        transport.compute()
        array = np.array([[1e16, 1.0, -1e16, 1.0][transport.rank]])
        transport.allreduce(array)
        return float(array[0])

    for seed in range(5):
        assert simulate(worker, 4, compute=Compute(1.0, "exponential"), seed=seed) == [1.0] * 4


@pytest.mark.parametrize(("size", "rounds"), [(1, 0), (2, 1), (5, 3), (8, 3)])
def test_engine_collectives_take_the_time_of_the_stated_model(size: int, rounds: int) -> None:
    def worker(transport: SimulatedTransport) -> list[float]:
        data, clocks = np.zeros(2**10), []
        transport.compute()
        for collective in (
            transport.barrier,
            lambda: transport.allreduce(data),
            lambda: transport.broadcast(data),
            lambda: transport.allgather(data),
        ):
            clocks.append(transport.clock())
            collective()
        return [*clocks[1:], transport.clock()]

    each = 2**13 / BANDWIDTH
    costs = [
        rounds * LATENCY,
        2 * rounds * LATENCY + 2 * (size - 1) / size * each,
        rounds * LATENCY + each * (size > 1),
        rounds * LATENCY + (size - 1) * each,
    ]
    compute = Compute(1.0, stragglers={size - 1: 3.0})  # all leave when the last has come
    expected = pytest.approx([3.0 + sum(costs[: count + 1]) for count in range(4)], rel=1e-14)
    assert simulate(worker, size, network=NETWORK, compute=compute) == [expected] * size


@pytest.mark.parametrize(
    "network",
    [
        Network(LATENCY, BANDWIDTH, links={(1, 0): Link(0.5, BANDWIDTH / 8)}),
        Network(0.5, BANDWIDTH, shared=[SharedLink(BANDWIDTH / 8)]),
        Network(LATENCY, BANDWIDTH, within_node=Link(0.5, BANDWIDTH / 8)),
    ],
)
def test_engine_collectives_go_by_the_slowest_wire(network: Network) -> None:
    def worker(transport: SimulatedTransport) -> float:
        transport.broadcast(np.zeros(2**10))
        return transport.clock()

    assert simulate(worker, 2, network=network) == [0.5 + 8 * 2**13 / BANDWIDTH] * 2


@pytest.mark.parametrize("other", ["allreduce of other shape", "allreduce of other dtype", "max", "barrier", "root"])
def test_collectives_that_do_not_belong_together_are_an_error(other: str) -> None:
    def worker(transport: SimulatedTransport) -> None:
        if other == "root":
            transport.broadcast(np.zeros(3), root=transport.rank)
        elif transport.rank == 0:
            transport.allreduce(np.zeros(3))
        elif other == "barrier":
            transport.barrier()
        elif other == "max":
            transport.allreduce(np.zeros(3), "max")
        else:
            transport.allreduce(np.zeros(4) if other.endswith("shape") else np.zeros(3, np.float32))

    with pytest.raises(SimulationError, match=r"collective number 0 is .* on rank 1, but .* on rank 0") as caught:
        simulate(worker, 2)
    assert isinstance(caught.value.__cause__, MismatchError)


def test_control_messages_and_objects_travel() -> None:
    def worker(transport: SimulatedTransport) -> tuple[list[float], list[int], object, list[object]]:
        own = {"loss": float(transport.rank), "has_ended": transport.rank == 2}
        by_rank = agree(transport, Intent(Event.ROUND, round=3), lambda: "is about to average", own)
        from_root = broadcast_object(transport, {"seed": 5} if transport.rank == 1 else None, root=1)
        everyone = allgather_object(transport, ["rank", transport.rank] * transport.rank)
        return by_rank["loss"].tolist(), ranks_where(by_rank["has_ended"]), from_root, everyone

    everyone = [["rank", rank] * rank for rank in range(4)]
    assert simulate(worker, 4) == [([0.0, 1.0, 2.0, 3.0], [2], {"seed": 5}, everyone)] * 4


def test_ranks_that_disagree_are_reported_on_every_rank() -> None:
    def worker(transport: SimulatedTransport) -> str:
        doing = "evaluates" if transport.rank == 1 else "averages"
        try:
            agree(transport, Intent(Event.EVALUATE if transport.rank == 1 else Event.ROUND), lambda: doing)
        except MismatchError as error:
            return str(error)
        return ""

    texts = simulate(worker, 3)
    assert len(set(texts)) == 1
    assert "ranks 0 and 2: averages; rank 1: evaluates" in texts[0]


def test_all_reduce_of_the_user_chooses_automatically() -> None:
    def worker(transport: SimulatedTransport) -> float:
        array = np.full((3, 5), transport.rank + 1, np.float32)
        all_reduce(transport, array, mean=True)
        return float(array.sum())

    assert simulate(worker, 4, local_size=2) == [2.5 * 15] * 4
