"""The delay model against closed forms, Monte Carlo and the simulator, which plays the same models step by step."""

import math
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy_model import Worker

from lentando.comm import simulate
from lentando.comm.errors import ConfigurationError
from lentando.comm.simulation import Compute, Link, Network
from lentando.comm.topology import Complete, OnePeerExponential, Ring, StaticExponential, Topology
from lentando.comm.transport import Transport
from lentando.optimizers.planning import (
    Delays,
    Problem,
    all_reduce_seconds,
    as_compute,
    best_period,
    cheap_period,
    deviation_seconds,
    error_bound,
    estimate_compute,
    expected_maximum_seconds,
    fit_delay,
    gossip_rate,
    harmonic_number,
    local_sgd_seconds,
    mean_seconds,
    network_delays,
    real_best_period,
    speed_up,
    stragglers,
)
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.gossip import OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.wire import wire_of

DRAWS = 40_000
TRACE = (0.1, 0.1, 0.12, 0.4)
NO_DELAY = Delays(0.0, 0.0)


def drawn(compute: Compute, size: int, steps: int) -> np.ndarray:
    """Maxima over ranks of mean times, drawn at random."""
    random = np.random.default_rng([size, steps])
    shape = (DRAWS // steps, size, steps)
    if compute.distribution == "exponential":
        times = random.exponential(compute.mean_seconds, shape)
    elif compute.distribution == "lognormal":
        variance = math.log1p(compute.variation**2)
        times = compute.mean_seconds * random.lognormal(-variance / 2, math.sqrt(variance), shape)
    else:
        times = random.choice(compute.trace, shape)
    factors = np.array([compute.stragglers.get(rank, 1.0) for rank in range(size)])
    return (times.mean(axis=2) * factors).max(axis=1)


@pytest.mark.parametrize("factors", [{}, {1: 1.5}, {0: 0.5, 1: 3.0}], ids=["equal", "one straggler", "unequal"])
@pytest.mark.parametrize("steps", [1, 3, 20])
@pytest.mark.parametrize("size", [2, 16])
@pytest.mark.parametrize(
    "compute",
    [
        partial(Compute, 0.18, "exponential"),
        partial(Compute, 0.18, "lognormal", variation=0.3),
        partial(Compute, 0.18, "lognormal", variation=1.0),
        partial(Compute, 0.0, "trace", trace=TRACE),
    ],
    ids=["exponential", "lognormal", "wide lognormal", "trace"],
)
def test_expected_maximum_equals_monte_carlo(compute: Any, size: int, steps: int, factors: dict[int, float]) -> None:
    model = compute(stragglers=factors)
    sample = drawn(model, size, steps)
    error = sample.std() / math.sqrt(sample.size)
    assert abs(expected_maximum_seconds(model, size, steps) - sample.mean()) < 5 * error + 1e-4 * sample.mean()


def test_maximum_of_exponentials_is_the_harmonic_number() -> None:
    """O29, in closed form and on the grid, which a straggler of factor 1 + 1e-12 asks for."""
    for size in (1, 2, 16, 1000):
        exact = 0.18 * harmonic_number(size)
        assert expected_maximum_seconds(Compute(0.18, "exponential"), size) == pytest.approx(exact, rel=1e-12)
    uneven = Compute(0.18, "exponential", stragglers={0: 1 + 1e-12})
    assert expected_maximum_seconds(uneven, 16) == pytest.approx(0.18 * harmonic_number(16), rel=1e-4)
    assert harmonic_number(16) == pytest.approx(3.3807, abs=1e-4)


def test_mean_of_exponentials_is_a_gamma_variable() -> None:
    """The published example: 16 ranks, Y = D = 1, period 10."""
    compute, delays = Compute(1.0, "exponential"), Delays(1.0, 1.0)
    assert expected_maximum_seconds(compute, 16, 10) == pytest.approx(1.634, abs=1e-3)
    assert local_sgd_seconds(compute, 16, delays, 10) == pytest.approx(1.734, abs=1e-3)
    for size, ratio in ((16, 2.52), (8, 2.34), (4, 2.14)):
        gained = all_reduce_seconds(compute, size, delays) / local_sgd_seconds(compute, size, delays, 10)
        assert gained == pytest.approx(ratio, abs=1e-2)


def test_maximum_over_a_trace_is_its_order_statistic() -> None:
    compute = Compute(0.0, "trace", trace=(0.1, 0.1, 0.1, 0.5))
    expected = 0.1 * 0.75**3 + 0.5 * (1 - 0.75**3)
    assert expected_maximum_seconds(compute, 3) == pytest.approx(expected, rel=1e-3)


@pytest.mark.slow
@given(
    distribution=st.sampled_from(["constant", "exponential", "lognormal"]),
    size=st.integers(1, 64),
    steps=st.integers(1, 5000),
    mean=st.floats(1e-6, 1e3),
    variation=st.floats(0.0, 2.0),
    factor=st.floats(1.0, 10.0),
)
@settings(deadline=None, max_examples=50)
def test_maximum_lies_between_mean_and_its_bound_and_falls_with_the_steps(
    distribution: Any, size: int, steps: int, mean: float, variation: float, factor: float
) -> None:
    compute = Compute(mean, distribution, variation=variation, stragglers={size - 1: factor})
    means = [mean_seconds(compute, rank) for rank in range(size)]
    deviations = [deviation_seconds(compute, rank) / math.sqrt(steps) for rank in range(size)]
    found = expected_maximum_seconds(compute, size, steps)
    slack = 1e-3 * max(means)
    # Aven (1985): E[max] <= max mean + sqrt((m - 1) / m * sum of variances).
    bound = max(means) + math.sqrt((size - 1) / size * sum(d**2 for d in deviations))
    assert max(means) - slack <= found <= bound + slack
    assert expected_maximum_seconds(compute, size, steps + 1) <= found + slack
    doubled = Compute(2 * mean, distribution, variation=variation, stragglers={size - 1: factor})
    assert expected_maximum_seconds(doubled, size, steps) == pytest.approx(2 * found, rel=1e-9)


def test_zero_ranks_are_refused() -> None:
    with pytest.raises(ConfigurationError, match="size and steps must be >= 1"):
        expected_maximum_seconds(Compute(1.0), 0)


def test_speed_up() -> None:
    """O28."""
    assert speed_up(2.0, 3.0, 1) == 1
    assert speed_up(1.0, 4.0, 20) == pytest.approx(4.1667, abs=1e-4)
    gains = [speed_up(1.0, 4.0, period) for period in range(1, 200)]
    assert gains == sorted(gains)
    assert speed_up(1.0, 4.0, 1e12) == pytest.approx(5.0)
    compute, delays = Compute(1.0), Delays(4.0, 4.0)
    from_times = all_reduce_seconds(compute, 8, delays) / local_sgd_seconds(compute, 8, delays, 20)
    assert from_times == pytest.approx(speed_up(1.0, 4.0, 20), rel=1e-12)
    with pytest.raises(ConfigurationError, match="period >= 1"):
        speed_up(1.0, 1.0, 0)


problems = st.builds(
    Problem,
    loss_gap=st.floats(0.1, 10),
    lipschitz=st.floats(0.1, 100),
    variance=st.floats(1e-3, 10),
    learning_rate=st.floats(1e-3, 1),
    time_seconds=st.floats(1, 1e5),
)


@pytest.mark.slow
@given(problem=problems, delay=st.floats(1e-3, 100), compute=st.floats(1e-3, 10), size=st.integers(1, 64))
def test_best_period_is_the_minimum_of_the_bound(problem: Problem, delay: float, compute: float, size: int) -> None:
    """O27: over the reals by a fine search, over the integers by looking at the neighbours."""
    real = real_best_period(problem, delay)
    around = real * np.linspace(0.5, 2.0, 3001)
    bounds = [error_bound(problem, compute, delay, size, period) for period in around]
    assert error_bound(problem, compute, delay, size, real) <= min(bounds) + 1e-9 * max(map(abs, bounds))
    best = best_period(problem, delay)
    at = error_bound(problem, compute, delay, size, best)
    for other in {max(1, best - 1), best + 1, 1, math.ceil(real)}:
        assert at <= error_bound(problem, compute, delay, size, other) * (1 + 1e-9)


def test_best_period_scales_as_published() -> None:
    problem = Problem(loss_gap=2.0, lipschitz=3.0, variance=0.5, learning_rate=0.05, time_seconds=600.0)
    real = real_best_period(problem, 0.2)
    assert real == pytest.approx(math.sqrt(2 * 2.0 * 0.2 / (0.05**3 * 3.0**2 * 0.5 * 600.0)))
    assert real_best_period(problem, 0.8) == pytest.approx(2 * real)
    assert problem.allows(1)
    assert not problem.allows(100)
    with pytest.raises(ConfigurationError, match="variance must be finite and > 0"):
        Problem(2.0, 3.0, 0.0, 0.05, 600.0)


@pytest.mark.parametrize("distribution", ["constant", "exponential", "lognormal"])
def test_cheap_period_is_the_smallest_that_is_cheap(distribution: Any) -> None:
    compute, delays = Compute(0.18, distribution), Delays(0.3, 0.3)
    period = cheap_period(compute, 8, delays, overhead=0.2)
    assert period is not None
    assert period > 1
    assert local_sgd_seconds(compute, 8, delays, period) <= 1.2 * 0.18
    assert local_sgd_seconds(compute, 8, delays, period - 1) > 1.2 * 0.18


def test_cheap_period_at_the_ends() -> None:
    assert cheap_period(Compute(1.0), 8, NO_DELAY) == 1
    assert cheap_period(Compute(1e-6), 8, Delays(1.0, 1.0)) is None
    # A rank that is slow permanently is no reason for a long period: no period makes it faster.
    assert cheap_period(Compute(1.0, stragglers={0: 5.0}), 8, NO_DELAY) == 1
    with pytest.raises(ConfigurationError, match="overhead"):
        cheap_period(Compute(1.0), 8, NO_DELAY, overhead=0.0)


# Against the simulator.

ELEMENTS = 4096
NETWORK = Network(latency_seconds=2e-3, bandwidth_bytes_per_second=4e6)
WITHOUT_PORTS = Network(2e-3, 4e6, links={(a, b): Link(2e-3, 4e6) for a in range(8) for b in range(8) if a != b})
"""A wire for each pair of ranks. Messages that share a port leave one after the other in the simulator, whose order the
delay model does not know: there it is exact for one message per step, and a lower bound for several."""


def simulated_seconds(
    compute: Compute, size: int, steps: int, *, elements: int = ELEMENTS, network: Network = NETWORK, **method: Any
) -> float:
    """Virtual time per step of a replica that trains a float64 vector."""

    def train(transport: Transport) -> float:
        worker = Worker(transport, lambda rank, step, x: 0.0 * x, np.zeros(elements), lambda step: 0.1, **method)
        worker.run(period)  # the first control message also carries the start
        started = transport.clock()
        worker.run(steps)
        return transport.clock() - started

    period = method.get("period") or 1
    if network.links:
        network = replace(network, links={pair: link for pair, link in network.links.items() if max(pair) < size})
    return float(np.mean(simulate(train, size, network=network, compute=compute, seed=1))) / steps


@pytest.mark.parametrize("size", [2, 3, 8])
@pytest.mark.parametrize("elements", [4104, 32784], ids=["backend", "ring"])
@pytest.mark.parametrize("factors", [{}, {1: 2.0}], ids=["equal", "straggler"])
def test_all_reduce_and_local_sgd_with_constant_times_are_exact(size: int, elements: int, factors: Any) -> None:
    compute = Compute(0.02, stragglers=factors)
    delays = network_delays(NETWORK, size, 8 * elements)
    found = simulated_seconds(compute, size, 4, elements=elements, base=AllReduce())
    assert found == pytest.approx(all_reduce_seconds(compute, size, delays), rel=1e-9)
    found = simulated_seconds(compute, size, 15, elements=elements, base=LocalSGD(), period=5)
    assert found == pytest.approx(local_sgd_seconds(compute, size, delays, 5), rel=1e-9)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", ["int8", "int4"])
def test_outer_steps_in_coded_messages_with_constant_times_are_exact(size: int, name: Any) -> None:
    elements = 256 * 512 * size if name == "int4" else 256 * 256 * size
    compute, coded_bytes = Compute(0.02), wire_of(name).size_bytes(np.zeros(elements))
    delays = network_delays(NETWORK, size, 8 * elements, coded_bytes=coded_bytes)
    found = simulated_seconds(compute, size, 15, elements=elements, base=LocalSGD(), period=5, wire_dtype=name)
    assert found == pytest.approx(local_sgd_seconds(compute, size, delays, 5), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["exponential", "lognormal"])
def test_all_reduce_and_local_sgd_with_random_times(distribution: Any) -> None:
    compute, size = Compute(0.02, distribution, variation=0.5), 6
    delays = network_delays(NETWORK, size, 8 * ELEMENTS)
    found = simulated_seconds(compute, size, 800, base=AllReduce())
    assert found == pytest.approx(all_reduce_seconds(compute, size, delays), rel=0.03)
    found = simulated_seconds(compute, size, 2400, base=LocalSGD(), period=6)
    assert found == pytest.approx(local_sgd_seconds(compute, size, delays, 6), rel=0.03)


@pytest.mark.parametrize("topology", [Ring(), OnePeerExponential(), StaticExponential(), Complete()], ids=repr)
@pytest.mark.parametrize("compute_seconds", [0.001, 0.02, 0.1])
def test_gossip_with_constant_times(topology: Topology, compute_seconds: float) -> None:
    size = 5
    graphs = topology.for_size(size)
    delays = network_delays(NETWORK, size, 8 * ELEMENTS)
    compute = Compute(compute_seconds)
    found = simulated_seconds(compute, size, 12, network=WITHOUT_PORTS, base=SGP(topology))
    predicted = gossip_rate(compute, graphs, delays)
    assert predicted.seconds == pytest.approx(compute_seconds + delays.exchange, rel=1e-9)
    assert predicted.standard_error_seconds < 1e-9
    assert found == pytest.approx(predicted.seconds, rel=1e-9)


@pytest.mark.parametrize("staleness", [1, 2, 4])
@pytest.mark.parametrize("compute_seconds", [0.001, 0.006, 0.02])
@pytest.mark.parametrize("latency_seconds", [2e-3, 60e-3])
def test_overlap_with_constant_times_hides_the_smaller(
    staleness: int, compute_seconds: float, latency_seconds: float
) -> None:
    size, network = 5, Network(latency_seconds, 4e6)
    graphs = OnePeerExponential().for_size(size)
    delays = network_delays(network, size, 8 * ELEMENTS)
    predicted = gossip_rate(Compute(compute_seconds), graphs, delays, staleness=staleness).seconds
    expected = max(compute_seconds, delays.exchange / staleness, delays.exchange_busy)
    assert predicted == pytest.approx(expected, rel=1e-2)
    found = simulated_seconds(Compute(compute_seconds), size, 240, network=network, base=OSGP(staleness=staleness))
    assert found == pytest.approx(predicted, rel=0.03)


@pytest.mark.slow
@pytest.mark.parametrize("period", [None, 10])
@pytest.mark.parametrize("staleness", [0, 1, 3])
@pytest.mark.parametrize(
    ("topology", "distribution"), [(Ring(), "exponential"), (OnePeerExponential(), "lognormal")], ids=repr
)
def test_gossip_with_random_times_equals_the_simulator(
    topology: Topology, distribution: Any, staleness: int, period: int | None
) -> None:
    size = 8
    compute = Compute(0.02, distribution, variation=0.5)
    graphs = topology.for_size(size)
    delays = network_delays(NETWORK, size, 8 * ELEMENTS)
    predicted = gossip_rate(compute, graphs, delays, staleness=staleness, period=period)
    network = NETWORK if topology == OnePeerExponential() else WITHOUT_PORTS
    method = {"base": OSGP(topology, staleness), "period": period}
    found = simulated_seconds(compute, size, 800, network=network, **method)
    assert found == pytest.approx(predicted.seconds, rel=0.04)
    assert predicted.lower_seconds <= predicted.seconds + 4 * predicted.standard_error_seconds
    assert predicted.seconds <= predicted.upper_seconds + 4 * predicted.standard_error_seconds
    assert predicted.standard_error_seconds < 0.01 * predicted.seconds


def test_gossip_waits_less_than_synchronous_sgd_and_more_than_no_waiting_at_all() -> None:
    """32 ranks with exponential times: the coupling costs, but less than a barrier in every step."""
    compute, graphs = Compute(0.02, "exponential"), OnePeerExponential().for_size(32)
    delays = network_delays(NETWORK, 32, 8 * ELEMENTS)
    sgp, osgp = (gossip_rate(compute, graphs, delays, staleness=staleness) for staleness in (0, 2))
    assert sgp.lower_seconds < sgp.seconds < sgp.upper_seconds < all_reduce_seconds(compute, 32, delays)
    assert 0.02 < osgp.seconds < sgp.seconds
    met = gossip_rate(compute, graphs, delays, period=10)
    assert sgp.seconds < met.seconds


def test_messages_that_share_a_port_take_at_least_their_time_on_it() -> None:
    for topology in (Ring(), StaticExponential(), Complete()):
        graphs = topology.for_size(5)
        degree = len(graphs.peers_in(0, 0).out_neighbors)
        predicted = gossip_rate(Compute(0.02), graphs, network_delays(NETWORK, 5, 8 * ELEMENTS, degree=degree)).seconds
        found = simulated_seconds(Compute(0.02), 5, 12, base=SGP(topology))
        assert predicted <= found < 0.02 + 3 * (predicted - 0.02)


def test_a_straggler_sets_the_pace_of_gossip() -> None:
    compute, graphs = Compute(0.02, stragglers={3: 4.0}), OnePeerExponential().for_size(8)
    delays = network_delays(NETWORK, 8, 8 * ELEMENTS)
    assert gossip_rate(compute, graphs, delays, staleness=1).seconds == pytest.approx(0.08, rel=1e-6)
    assert simulated_seconds(compute, 8, 60, base=OSGP()) == pytest.approx(0.08, rel=0.03)


# Estimates.


def test_delay_is_fitted_by_latency_and_bandwidth() -> None:
    sizes = [1e3, 1e4, 1e5, 1e6, 1e7]
    fitted = fit_delay(sizes, [3e-5 + size / 1.2e9 for size in sizes])
    assert fitted.latency_seconds == pytest.approx(3e-5)
    assert 1 / fitted.seconds_per_byte == pytest.approx(1.2e9)
    assert fitted.seconds(2.4e9) == pytest.approx(2.00003)


def test_a_fitted_delay_is_never_negative() -> None:
    assert fit_delay([1, 10, 100], [1e-3, 10e-3, 110e-3]).latency_seconds >= 0
    assert fit_delay([1, 10, 100], [5e-3, 4e-3, 3e-3]).seconds_per_byte == 0
    steep = fit_delay([100, 200], [1.0, 4.0])
    assert steep.latency_seconds == 0
    assert steep.seconds(150) > 0


def test_a_delay_needs_two_sizes() -> None:
    with pytest.raises(ConfigurationError, match="at least two sizes"):
        fit_delay([8, 8], [1.0, 2.0])
    with pytest.raises(ConfigurationError, match="times > 0"):
        fit_delay([8, 16], [0.0, 2.0])


def test_compute_time_is_estimated_from_samples_of_several_steps() -> None:
    """The deviation of one step, though only means over many were seen."""
    random = np.random.default_rng(3)
    counts = random.integers(1, 30, 4000)
    samples = [float(random.exponential(0.2, count).sum()) for count in counts]
    found = estimate_compute(samples, counts.tolist())
    assert found.steps == counts.sum()
    assert found.mean_seconds == pytest.approx(0.2, rel=0.02)
    assert found.deviation_seconds == pytest.approx(0.2, rel=0.05)
    single = estimate_compute(random.exponential(0.2, 4000).tolist())
    assert single.tail_seconds == pytest.approx(-0.2 * math.log(0.05), rel=0.1)
    assert math.isnan(estimate_compute([0.1]).deviation_seconds)
    with pytest.raises(ConfigurationError, match="at least one step"):
        estimate_compute([])


def test_measured_ranks_make_a_compute_model() -> None:
    model = as_compute([0.1, 0.2, 0.1], [0.02, 0.04, 0.02])
    assert [mean_seconds(model, rank) for rank in range(3)] == pytest.approx([0.1, 0.2, 0.1])
    assert [deviation_seconds(model, rank) for rank in range(3)] == pytest.approx([0.02, 0.04, 0.02])
    assert as_compute([0.1, 0.1], [math.nan, math.nan]).distribution == "constant"
    assert as_compute([0.0, 0.0], [0.0, 0.0]).mean_seconds == 0


def test_stragglers_are_named_when_it_is_no_accident() -> None:
    assert stragglers([1.0, 1.0, 1.5, 1.0], [0.1] * 4, 100) == [2]
    assert stragglers([1.0, 2.0], [math.nan] * 2, 100) == [1]
    assert stragglers([1.0, 1.1, 0.9], [0.0] * 3, 100) == []
    assert stragglers([1.0, 1.0, 1.5, 1.0], [1.0] * 4, 10) == []  # three standard errors are 0.95
    assert stragglers([1.0], [0.0], 1) == []
