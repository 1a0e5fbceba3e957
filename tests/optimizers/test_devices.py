"""Replicas on a device train as those in host memory do, bit-identically. ``device_arrays`` stands in for a GPU's."""

import time
from collections.abc import Callable
from itertools import product
from typing import Any

import device_arrays
import numpy as np
import pytest
from case_selection import selected_cases
from device_arrays import DeviceArray, waits
from matching_nccl import run_ranks_on_devices
from numpy_model import Worker

from lentando.comm.array_module import copy_into, to_host
from lentando.comm.dtypes import bfloat16
from lentando.comm.errors import MismatchError, NonFiniteError
from lentando.comm.testing import run_ranks
from lentando.comm.topology import Complete, Ring
from lentando.comm.transport import Array, Transport
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.slow_momentum import SlowMomentum

METHODS: dict[str, dict[str, Any]] = {
    "synchronous SGD": {"base": AllReduce("backend")},
    "synchronous SGD, no overlap to be had": {"base": AllReduce("backend", overlap=True)},
    "Local SGD": {"base": LocalSGD(), "period": 3},
    "SlowMo": {"base": LocalSGD(), "period": 3, "outer": SlowMomentum()},
    "SlowMo, slow_lr": {"base": LocalSGD(), "period": 3, "outer": SlowMomentum(0.7, 0.6)},
    "Lookahead": {"base": LocalSGD(), "period": 3, "outer": SlowMomentum(0.5, 0.0)},
    "DiLoCo": {"base": LocalSGD(), "period": 3, "outer": OuterSGD(0.7, 0.9, nesterov=True)},
    "SlowMo, Nesterov": {"base": LocalSGD(), "period": 3, "outer": SlowMomentum(0.7, 0.9, nesterov=True)},
    "no exact average": {"base": SGP(), "period": 3, "outer": SlowMomentum(), "exact_average": False},
    "average of base buffers": {"base": LocalSGD(), "period": 3, "base_buffers": "average"},
    "SGP": {"base": SGP()},
    "SGP over a ring": {"base": SGP(Ring()), "period": 4, "outer": SlowMomentum()},
    "DPSGD": {"base": DPSGD(Complete())},
    "OSGP": {"base": OSGP(deterministic=True), "period": 5, "outer": SlowMomentum()},
    "OSGP, two rounds late": {"base": OSGP(staleness=2, deterministic=True)},
    "SGP in bfloat16": {"base": SGP(wire_dtype="bfloat16"), "period": 5, "outer": SlowMomentum()},
    "OSGP in float16": {"base": OSGP(Ring(), deterministic=True, wire_dtype="float16")},
}
STEPS = 11


DTYPES = [np.float32, np.float64, np.float16, bfloat16]


def gradient(rank: int, step: int, x: Array) -> Array:
    noise = np.random.default_rng([rank, step]).normal(size=x.size)
    return (0.3 * x.astype(np.float64) - 0.1 * rank + 0.2 * noise).astype(x.dtype)


def rate(step: int) -> float:
    """Another in each round and within it; 0 in the second round."""
    return 0.0 if 3 <= step < 6 else 0.05 + 0.01 * (step % 4)


def start(dtype: Any) -> Array:
    return np.linspace(-1, 1, 13).astype(dtype)


def worker(transport: Transport, method: str, dtype: Any, place: Callable[[Array], Array], **changes: Any) -> Worker:
    # The stand-in sums halves in the order of the ranks, as the backend of ``ThreadTransport`` does.
    on_device = place is device_arrays.asarray
    settings = {"algorithm": "auto" if on_device else "backend", **METHODS[method], **changes}
    return Worker(transport, gradient, start(dtype), rate, momentum=0.9, place=place, **settings)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("size", "dtype"),
    selected_cases([*product([3], DTYPES), (1, np.float32), (4, np.float32)], list(product([1, 3, 4], DTYPES))),
)
def test_training_is_that_of_host_memory_bit_identically(method: str, dtype: Any, size: int) -> None:
    def trained(place: Callable[[Array], Array]) -> Callable[[Transport], bytes]:
        return lambda transport: to_host(worker(transport, method, dtype, place).run(STEPS)).tobytes()

    assert run_ranks_on_devices(size, trained(device_arrays.asarray)) == run_ranks(size, trained(np.asarray))


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_other_ways_to_average_train_alike(algorithm: str) -> None:
    def trained(place: Callable[[Array], Array]) -> Callable[[Transport], bytes]:
        return lambda transport: to_host(
            worker(transport, "SlowMo", np.float32, place, algorithm=algorithm).run(STEPS)
        ).tobytes()

    assert run_ranks_on_devices(3, trained(device_arrays.asarray)) == run_ranks(3, trained(np.asarray))


@pytest.mark.parametrize("base", [SGP(), SGP(Ring()), OSGP(), OSGP(staleness=2), OSGP(Ring(), 3, deterministic=True)])
def test_gossip_comes_to_its_end_whichever_rank_is_late(base: Any) -> None:
    """Messages take longer than steps, and ranks take turns in being late."""

    def train(transport: Transport) -> float:
        own = worker(transport, "SGP", np.float64, device_arrays.asarray, base=base)
        for step in range(STEPS):
            if step % transport.size == transport.rank:
                time.sleep(0.02)
            own.run(1)
        own.replica.setup.wait_in_flight()
        return own.replica.consensus_distance()

    distances = run_ranks_on_devices(4, train, latency_seconds=0.005)
    assert len(set(distances)) == 1
    assert 0 < distances[0] < 1


@pytest.mark.parametrize(
    ("method", "at_most"),
    [
        ("Local SGD", [0, 0, 4]),
        ("SlowMo", [0, 0, 4]),
        ("DiLoCo", [0, 0, 4]),
        ("OSGP", [0, 0, 0, 0, 4]),
        ("SGP", [0]),
        ("OSGP in float16", [0]),
    ],
)
def test_host_reads_nothing_back_from_the_device_between_outer_steps(method: str, at_most: list[int]) -> None:
    def train(transport: Transport) -> list[int]:
        own = worker(transport, method, np.float32, device_arrays.asarray)
        counts = []
        for step in range(1 + 2 * len(at_most)):
            own.model.gradient.fill(0.1)
            own.replica.before_step()  # the very first takes a checksum
            own.model.step()
            before = waits()
            own.replica.after_step()
            if step:
                counts.append(waits() - before)
        return counts

    period = len(at_most)
    for counts in run_ranks_on_devices(2, train):
        for step, count in enumerate(counts, start=1):
            assert count <= at_most[step % period], counts


@pytest.mark.parametrize("method", ["SlowMo", "OSGP", "OSGP, two rounds late", "OSGP in float16"])
def test_state_is_in_host_memory_and_resumes_on_the_device_bit_identically(method: str) -> None:
    def resume(transport: Transport) -> tuple[bytes, bytes]:
        first = worker(transport, method, np.float32, device_arrays.asarray)
        first.run(7)
        state = first.replica.state_dict()
        assert not devices_in(state)
        x, momentum = to_host(first.model.x), to_host(first.model.momentum_buffer)
        uninterrupted = to_host(first.run(6)).tobytes()
        second = worker(transport, method, np.float32, device_arrays.asarray)
        copy_into(second.model.x, x)
        copy_into(second.model.momentum_buffer, momentum)
        second.replica.load_state_dict(state)
        return uninterrupted, to_host(second.run(6)).tobytes()

    for uninterrupted, resumed in run_ranks_on_devices(3, resume):
        assert resumed == uninterrupted


def devices_in(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(devices_in, value.values()))
    if isinstance(value, list):
        return any(map(devices_in, value))
    return isinstance(value, DeviceArray)


def test_average_can_be_looked_at_and_left_again() -> None:
    def look(transport: Transport) -> tuple[float, list[float], list[float]]:
        own = worker(transport, "Local SGD", np.float64, device_arrays.asarray, period=100)
        own.run(5)
        before = own.model.x.tolist()
        with own.replica.averaged():
            average = own.model.x.tolist()
        assert own.model.x.tolist() == before
        return own.replica.consensus_distance(), before, average

    results = run_ranks_on_devices(3, look)
    mean = np.mean([before for _, before, _ in results], axis=0)
    for distance, _, average in results:
        assert distance == results[0][0] > 0
        np.testing.assert_allclose(average, mean, rtol=1e-12)


def test_average_that_is_not_finite_is_refused_by_name_and_leaves_all_as_it_was() -> None:
    def diverge(transport: Transport) -> tuple[str, list[float]]:
        own = worker(transport, "SlowMo", np.float32, device_arrays.asarray)
        own.run(2)
        if transport.rank == 1:
            own.model.x[12] = np.inf
        expected = own.model.x.tolist()
        own.model.rates = [0.0, 0.0]
        own.replica.before_step()
        with pytest.raises(NonFiniteError) as error:
            own.replica.after_step()
        assert own.model.x.tolist() == expected
        return str(error.value), expected

    for message, _ in run_ranks_on_devices(2, diverge):
        assert "rank 0: all parameters are finite; rank 1: 'part1' is not finite" in message


def test_ranks_in_different_places_are_named_before_anything_is_sent() -> None:
    def construct(transport: Transport) -> str:
        place = np.asarray if transport.rank == 1 else device_arrays.asarray
        with pytest.raises(MismatchError) as error:
            worker(transport, "SlowMo", np.float32, place)
        return str(error.value)

    for message in run_ranks_on_devices(3, construct):
        assert "ranks 0 and 2: the memory of a GPU; rank 1: host memory." in message
