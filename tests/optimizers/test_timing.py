"""What a replica finds out about its own speed, in the simulator, where the truth is known."""

from typing import Any

import numpy as np
import pytest
from numpy_model import Worker

from lentando.comm import simulate
from lentando.comm.simulation import Compute, Network
from lentando.comm.transport import Transport
from lentando.optimizers.planning import Delays, all_reduce_seconds, local_sgd_seconds, network_delays
from lentando.optimizers.report import report_of
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import SGP
from lentando.optimizers.rules.local_sgd import LocalSGD

NETWORK = Network(latency_seconds=2e-3, bandwidth_bytes_per_second=4e6)
ELEMENTS = 4104
METHODS: dict[str, Any] = {
    "synchronous SGD": {"base": AllReduce()},
    "Local SGD": {"base": LocalSGD(), "period": 5},
    "Local SGD, period 1": {"base": LocalSGD(), "period": 1},
    "averages of both kinds": {"base": AllReduce(), "period": 4},
    "SGP with outer steps": {"base": SGP(), "period": 4},
}


def reports(size: int, steps: int, compute: Compute, pause: bool = False, **method: Any) -> list[dict[str, Any]]:
    """What each rank reports at the end."""

    def train(transport: Transport) -> dict[str, Any]:
        worker = Worker(transport, lambda rank, step, x: 0.0 * x, np.zeros(ELEMENTS), lambda step: 0.1, **method)
        for _ in range(4):
            worker.run(steps // 4)
            if pause:
                with worker.replica.averaged():
                    transport.compute(100.0)  # an evaluation  # type: ignore[attr-defined]
                worker.replica.consensus_distance()
        return report_of(worker.replica)

    return simulate(train, size, network=NETWORK, compute=compute, seed=2)


@pytest.mark.parametrize("pause", [False, True], ids=["training only", "with evaluations"])
@pytest.mark.parametrize("name", METHODS)
def test_constant_times_are_found_exactly(name: str, pause: bool) -> None:
    method = METHODS[name]
    size, period = 4, method.get("period")
    delays = network_delays(NETWORK, size, 8 * ELEMENTS)
    found = reports(size, 40, Compute(0.02), pause, **method)
    for report in found:
        assert report["compute_seconds"] == pytest.approx(0.02, rel=1e-9)
        assert report["compute_deviation_seconds"] == pytest.approx(0.0, abs=1e-9)
        assert report["compute_seconds_by_rank"] == pytest.approx([0.02] * size, rel=1e-9)
        assert report["stragglers"] == []
        assert report["waiting_seconds"] == pytest.approx(0.0, abs=1e-9)
        expected = delays.outer_step if period else delays.gradient_average
        if name != "SGP with outer steps":
            assert report["delay_seconds"] == pytest.approx(expected, rel=1e-9)
            assert report["delay_ratio"] == pytest.approx(expected / 0.02, rel=1e-9)
            assert report["predicted_seconds_per_step"] == pytest.approx(report["seconds_per_step"], rel=0.03)
        else:
            assert report["exchange_seconds"] == pytest.approx(delays.exchange, rel=1e-3)
            assert report["predicted_seconds_per_step"] is None
        assert report["size"] == size
        assert report["model_bytes"] == 8 * ELEMENTS


@pytest.mark.slow
@pytest.mark.parametrize("name", ["synchronous SGD", "Local SGD"])
def test_random_times_are_found_and_predicted(name: str) -> None:
    method = METHODS[name]
    size, compute = 4, Compute(0.02, "lognormal", variation=0.5)
    delays = network_delays(NETWORK, size, 8 * ELEMENTS)
    found = reports(size, 2000, compute, **method)
    for report in found:
        assert report["compute_seconds"] == pytest.approx(0.02, rel=0.06)
        assert report["compute_deviation_seconds"] == pytest.approx(0.01, rel=0.15)
        expected = delays.outer_step if "period" in method else delays.gradient_average
        assert report["delay_seconds"] == pytest.approx(expected, rel=1e-6)  # though ranks wait for each other
        assert report["predicted_seconds_per_step"] == pytest.approx(report["seconds_per_step"], rel=0.03)
        assert report["waiting_seconds"] > 0
        assert report["stragglers"] == []
    assert len({str(report["compute_seconds_by_rank"]) for report in found}) == 1
    if name == "Local SGD":
        control_seconds = 2 * 2e-3
        synchronous = all_reduce_seconds(compute, size, Delays(delays.outer_step - control_seconds, 0.0))
        saved = 2000 * (synchronous - local_sgd_seconds(compute, size, delays, 5))
        assert found[0]["seconds_saved"] == pytest.approx(saved, rel=0.1)
    else:
        assert found[0]["seconds_saved"] == 0


@pytest.mark.parametrize("name", ["synchronous SGD", "Local SGD", "averages of both kinds", "SGP with outer steps"])
def test_a_straggler_is_named_and_waited_for(name: str) -> None:
    found = reports(4, 200, Compute(0.02, "lognormal", variation=0.2, stragglers={2: 1.6}), **METHODS[name])
    for rank, report in enumerate(found):
        assert report["stragglers"] == [2]
        assert report["compute_seconds_by_rank"][2] == pytest.approx(0.032, rel=0.1)
        if name != "SGP with outer steps":
            waited = report["waiting_seconds"] / 200
            assert waited < 0.001 if rank == 2 else waited == pytest.approx(0.012, rel=0.2)


def test_two_rounds_know_no_deviation_but_predict() -> None:
    (report, _) = reports(2, 12, Compute(0.02), base=LocalSGD(), period=6)
    assert report["compute_seconds"] == pytest.approx(0.02)
    assert report["predicted_seconds_per_step"] is not None


def test_what_is_not_known_is_none() -> None:
    (report, _) = reports(2, 4, Compute(0.02), base=LocalSGD(), period=50)
    for name in ("compute_seconds", "delay_seconds", "stragglers", "predicted_seconds_per_step", "seconds_saved"):
        assert report[name] is None


@pytest.mark.slow
def test_a_new_speed_is_noticed() -> None:
    """Old samples fade: a rank that slows down after two thousand steps is named within as many."""

    def train(transport: Any) -> tuple[list[int], list[int]]:
        worker = Worker(transport, lambda rank, step, x: 0.0 * x, np.zeros(8), lambda step: 0.1, base=AllReduce())
        worker.run(2000)
        before = report_of(worker.replica)["stragglers"]
        for _ in range(2000):
            transport.compute(0.02 * (transport.rank == 1))
            worker.run(1)
        return before, report_of(worker.replica)["stragglers"]

    assert simulate(train, 3, compute=Compute(0.02)) == [([], [1])] * 3


def test_a_pause_between_two_steps_is_not_computing() -> None:
    def train(transport: Any) -> dict[str, Any]:
        worker = Worker(transport, lambda rank, step, x: 0.0 * x, np.zeros(8), lambda step: 0.1, base=AllReduce())
        for _ in range(5):
            worker.run(20)
            transport.compute(3.0 if transport.rank == 0 else 5.0)  # a checkpoint
        worker.run(20)
        return report_of(worker.replica)

    for report in simulate(train, 2, compute=Compute(0.02)):
        assert report["compute_seconds"] == pytest.approx(0.02)
        assert report["seconds_per_step"] == pytest.approx(report["predicted_seconds_per_step"], abs=5 * 2.0 / 100)
