"""Time per step of gossip, where a rank waits for its in-neighbours, and through them, later, for all ranks.

A step of rank i ends when it has computed and its in-neighbours' messages have arrived. Times follow

    t_i(k + 1) = max(t_i(k) + Y_i(k), max over in-neighbours j of t_j(k) + Y_j(k) + G)

with G the delay of an exchange: a linear system in (max, +) algebra (Baccelli, Cohen, Olsder, Quadrat, "Synchronization
and Linearity", 1992), whose time per step converges to one rate for all ranks on a connected graph. Random compute
times have no closed form for it. With overlap SGP and staleness s, a rank waits for a message s steps later:

    t_i(k + 1) = max(t_i(k) + Y_i(k), max over j of t_j(k + 1 - s) + G)

where t_i(k + 1) is when step k ends and its message leaves. So s steps of compute hide the exchange.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log1p, sqrt

import numpy as np
from numpy.typing import NDArray

from lentando.comm.cluster import Compute
from lentando.comm.topology.base import GraphSequence
from lentando.optimizers.planning.delays import Delays
from lentando.optimizers.planning.maximum import expected_maximum_seconds, mean_seconds

__all__ = ["GossipRate", "gossip_rate"]

Floats = NDArray[np.float64]

BATCHES = 16
"""Number of parts into which the run is cut. Their scatter gives the standard error."""


@dataclass(frozen=True)
class GossipRate:
    """The time per step of gossip.

    Attributes:
        seconds: long-run mean of the time per step. Exact for constant compute times, an estimate otherwise.
        standard_error_seconds: standard error of that estimate.
        lower_seconds: lower bound: each rank must compute, and each message must be transferred.
        upper_seconds: upper bound without staleness: all ranks wait for all ranks in every step; infinite otherwise.
    """

    seconds: float
    standard_error_seconds: float
    lower_seconds: float
    upper_seconds: float


def gossip_rate(
    compute: Compute,
    graphs: GraphSequence,
    delays: Delays,
    *,
    staleness: int = 0,
    period: int | None = None,
    slow_momentum: bool = False,
    seed: int = 0,
) -> GossipRate:
    """Estimate the time per step of gossip by a Monte Carlo simulation of the recursion, after a warm-up.

    With constant Y and one message per step: SGP Y + G, OSGP max(Y, G / staleness, time on the port). With random Y,
    E[max of all Y] + G bounds SGP from above (waiting for more ranks makes no rank faster: the recursion is monotone).
    E[Y_i] bounds it from below, and so does min_i E[Y_i] + G on graphs where every rank has an in-neighbour in each
    step (the weight of one path through the recursion). An outer step, every ``period`` steps, waits for all ranks and
    all messages.

    Ports are modelled as in the simulator: each rank sends one message at a time and receives one at a time. With
    several messages per step, the order in which they share ports is approximated.

    Args:
        compute: distribution of compute times (Y).
        graphs: communication graphs by step.
        delays: delays of exchange and outer step.
        staleness: staleness of OSGP in steps; 0 is SGP.
        period: inner steps between outer steps; None without outer steps.
        slow_momentum: whether outer steps include slow momentum.
        seed: seed of the Monte Carlo simulation.

    Example:
        >>> from lentando.comm.cluster import Compute
        >>> from lentando.comm.topology import OnePeerExponential
        >>> delays = Delays(gradient_average=0.1, outer_step=0.1, exchange=0.05, exchange_busy=0.05)
        >>> graphs = OnePeerExponential().for_size(4)
        >>> round(gossip_rate(Compute(0.2), graphs, delays).seconds, 3)
        0.25
        >>> round(gossip_rate(Compute(0.2), graphs, delays, staleness=1).seconds, 3)
        0.2
    """
    size = graphs.size
    runs = max(1, 2048 // size)
    lead, counted = max(100, 4 * size), max(25 * BATCHES, 8 * size)
    if period is not None:
        lead, counted = _multiple(max(lead, period), period), _multiple(max(counted, 4 * period), BATCHES * period)
    system = _System(graphs, delays, staleness, runs)
    draw = _sampler(compute, size, runs, np.random.default_rng(seed))
    marks = []
    for step in range(lead + counted):
        if step >= lead and (step - lead) % (counted // BATCHES) == 0:
            marks.append(system.ready.mean())
        system.step(step, draw())
        if period is not None and (step + 1) % period == 0:
            system.outer_step(delays.outer_step + (delays.slow_momentum if slow_momentum else 0.0))
    marks.append(system.ready.mean())
    rates = np.diff(marks) / (counted // BATCHES)
    means = [mean_seconds(compute, rank) for rank in range(size)]
    lower, upper = max(means) + delays.exchange_local, inf
    outer = 0.0 if period is None else delays.outer_step / period
    if not staleness:
        every_step = [graphs.peers_in(rank, phase) for rank in range(size) for phase in range(graphs.phases)]
        has_senders = all(peers.in_neighbors for peers in every_step)
        lower = max(lower, min(means) + delays.exchange_local + (delays.exchange if has_senders else 0.0))
        upper = expected_maximum_seconds(compute, size) + delays.exchange_local + delays.exchange
        upper += outer + (delays.slow_momentum / period if period is not None and slow_momentum else 0.0)
    return GossipRate(float(rates.mean()), float(rates.std(ddof=1) / sqrt(BATCHES)), lower, upper)


class _System:
    """Simulated clocks of ``runs`` independent systems of ranks, as arrays of shape (runs, ranks).

    Attributes:
        ready: time at which each rank begins its next step.
    """

    def __init__(self, graphs: GraphSequence, delays: Delays, staleness: int, runs: int) -> None:
        size = graphs.size
        self.ready = np.zeros((runs, size))
        self._delays, self._staleness, self._graphs = delays, staleness, graphs
        self._port_out, self._port_in = np.zeros((runs, size)), np.zeros((runs, size))
        nothing = np.full((runs, size), -inf)
        self._arrived = [nothing] * (staleness + 1)
        self._left = [nothing] * (staleness + 1)
        self._in = [self._indices([[p for p, _ in graphs.peers_in(r, n).in_neighbors] for r in range(size)])
                    for n in range(graphs.phases)]  # fmt: skip
        degrees = [[len(graphs.peers_in(r, n).out_neighbors) for r in range(size)] for n in range(graphs.phases)]
        most = max(max(row) for row in degrees)
        self._busy = [delays.exchange_busy * np.array(row) / max(most, 1) for row in degrees]

    def step(self, number: int, seconds: Floats) -> None:
        """Advance every rank by one step: compute for ``seconds``, send, and wait for the messages that are due."""
        slots = self._staleness + 1
        phase = self._graphs.phase(number)
        done = self.ready + seconds + self._delays.exchange_local
        if self._staleness:
            done = np.maximum(done, self._arrived[(number - self._staleness) % slots])
            done = np.maximum(done, self._left[number % slots])  # the message whose buffer is reused
        start = np.maximum(done, self._port_out)
        self._left[number % slots] = self._port_out = start + self._busy[phase]
        sent = self._latest_in(start, phase)
        has_senders = sent > -inf
        occupied = np.maximum(sent, self._port_in) + self._delays.exchange_busy
        self._port_in = np.where(has_senders, occupied, self._port_in)
        arrived = np.where(has_senders, occupied + (self._delays.exchange - self._delays.exchange_busy), -inf)
        self._arrived[number % slots] = arrived
        self.ready = done if self._staleness else np.maximum(done, arrived)

    def outer_step(self, seconds: float) -> None:
        """Let all ranks wait for each other and for all messages, and then take an outer step of ``seconds``."""
        latest = np.maximum(self.ready, np.max(self._arrived, axis=0)).max(axis=1, keepdims=True)
        self.ready = np.repeat(latest + seconds, self.ready.shape[1], axis=1)

    def _latest_in(self, times: Floats, phase: int) -> Floats:
        """Return the latest time among each rank's in-neighbours; -inf where it has none."""
        padded = np.concatenate([times, np.full((times.shape[0], 1), -inf)], axis=1)
        return np.asarray(padded[:, self._in[phase]].max(axis=2))

    @staticmethod
    def _indices(neighbors: list[list[int]]) -> NDArray[np.int64]:
        """Return the neighbours as one array, padded to equal length with the number of ranks."""
        degree = max(1, *map(len, neighbors))
        return np.array([[*ranks, *[len(neighbors)] * (degree - len(ranks))] for ranks in neighbors])


def _sampler(compute: Compute, size: int, runs: int, random: np.random.Generator) -> Callable[[], Floats]:
    """Return a function that draws the times of one step, shape (runs, ranks)."""
    factors = np.array([compute.stragglers.get(rank, 1.0) for rank in range(size)])
    shape = (runs, size)
    if compute.distribution == "exponential":
        return lambda: random.exponential(compute.mean_seconds, shape) * factors
    if compute.distribution == "lognormal" and compute.mean_seconds:
        variance = log1p(compute.variation**2)
        shift, sigma = np.log(compute.mean_seconds) - variance / 2, sqrt(variance)
        return lambda: random.lognormal(shift, sigma, shape) * factors
    if compute.distribution == "trace":
        values = np.asarray(compute.trace)
        return lambda: np.asarray(random.choice(values, shape)) * factors
    constant = np.full(shape, compute.mean_seconds) * factors
    return lambda: constant


def _multiple(value: int, of: int) -> int:
    return -(-value // of) * of
