"""The speed of gossip: ranks that wait for their in-neighbours only, and through them, later, for everybody.

A step of rank i ends when it has computed and its in-neighbours' messages are there: times follow

    t_i(k + 1) = max(t_i(k) + Y_i(k), max over in-neighbours j of t_j(k) + Y_j(k) + G)

with G the delay of an exchange: a linear system in (max, +) algebra (Baccelli, Cohen, Olsder, Quadrat, "Synchronization
and Linearity", 1992), whose time per step converges to one rate for all ranks on a connected graph. Random compute
times have no closed form for it. A message of overlap SGP with staleness s is waited for s steps later:

    t_i(k + 1) = max(t_i(k) + Y_i(k), max over j of t_j(k + 1 - s) + G)

where t_i(k + 1) is when step k ends, and its message leaves. So exchange hides behind s steps of compute.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import inf, log1p, sqrt

import numpy as np
from numpy.typing import NDArray

from lentando.comm.cluster.compute import Compute
from lentando.comm.topology.base import GraphSequence
from lentando.optimizers.planning.delays import Delays
from lentando.optimizers.planning.maximum import expected_maximum_seconds, mean_seconds

__all__ = ["GossipRate", "gossip_rate"]

Floats = NDArray[np.float64]

BATCHES = 16
"""The run is cut into so many parts, whose scatter tells the standard error."""


@dataclass(frozen=True)
class GossipRate:
    """The time per step of gossip.

    Attributes:
        seconds: per step, the long-run mean. Exact for constant compute times, an estimate otherwise.
        standard_error_seconds: of that estimate.
        lower_seconds: a bound: the rate cannot be less. Each rank must compute, and each message must travel.
        upper_seconds: a bound, if there is no staleness: as if all ranks waited for all in every step.
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
    """Monte Carlo of the recursion above, many runs at a time, started a while before it counts.

    With constant Y and one message per step: SGP Y + G, OSGP max(Y, G / staleness, time on the port). With random Y,
    E[max of all Y] + G bounds SGP from above (to wait for more ranks makes nobody faster: the recursion is monotone),
    and both E[Y_i] and, on graphs where every rank hears somebody in each step, min_i E[Y_i] + G from below (the weight
    of one path through the recursion). An outer step, every ``period`` steps, waits for all ranks and all messages.

    Wires are those of ``lentando.comm.simulation.Network``: a rank's port sends one message at a time and receives
    one. For several messages per step the order in which they share ports is approximated.

    Args:
        compute: Y.
        graphs: who hears whom.
        delays: of exchange and outer step.
        staleness: of OSGP; 0 is SGP.
        period: inner steps between outer steps; None for none.
        slow_momentum: whether the outer steps take it.
        seed: of the Monte Carlo.
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
            system.meet(delays.outer_step + (delays.slow_momentum if slow_momentum else 0.0))
    marks.append(system.ready.mean())
    rates = np.diff(marks) / (counted // BATCHES)
    means = [mean_seconds(compute, rank) for rank in range(size)]
    lower, upper = max(means) + delays.exchange_local, inf
    outer = 0.0 if period is None else delays.outer_step / period
    if not staleness:
        hears = all(graphs.peers_in(rank, phase).in_neighbors for rank in range(size) for phase in range(graphs.phases))
        lower = max(lower, min(means) + delays.exchange_local + (delays.exchange if hears else 0.0))
        upper = expected_maximum_seconds(compute, size) + delays.exchange_local + delays.exchange
        upper += outer + (delays.slow_momentum / period if period is not None and slow_momentum else 0.0)
    return GossipRate(float(rates.mean()), float(rates.std(ddof=1) / sqrt(BATCHES)), lower, upper)


class _System:
    """Times of ``runs`` independent systems of ranks, shape (runs, ranks).

    Attributes:
        ready: when each rank begins its next step.
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
        """Every rank computes for ``seconds``, sends, and waits for what is due."""
        slots = self._staleness + 1
        phase = self._graphs.phase(number)
        done = self.ready + seconds + self._delays.exchange_local
        if self._staleness:
            done = np.maximum(done, self._arrived[(number - self._staleness) % slots])
            done = np.maximum(done, self._left[number % slots])  # the message whose memory is needed now
        start = np.maximum(done, self._port_out)
        self._left[number % slots] = self._port_out = start + self._busy[phase]
        heard = self._heard(start, phase)
        hears = heard > -inf
        occupied = np.maximum(heard, self._port_in) + self._delays.exchange_busy
        self._port_in = np.where(hears, occupied, self._port_in)
        arrived = np.where(hears, occupied + (self._delays.exchange - self._delays.exchange_busy), -inf)
        self._arrived[number % slots] = arrived
        self.ready = done if self._staleness else np.maximum(done, arrived)

    def meet(self, seconds: float) -> None:
        """All ranks wait for each other and for all messages, then spend ``seconds`` together."""
        latest = np.maximum(self.ready, np.max(self._arrived, axis=0)).max(axis=1, keepdims=True)
        self.ready = np.repeat(latest + seconds, self.ready.shape[1], axis=1)

    def _heard(self, times: Floats, phase: int) -> Floats:
        """The latest of each rank's in-neighbours; -inf where it has none."""
        padded = np.concatenate([times, np.full((times.shape[0], 1), -inf)], axis=1)
        return np.asarray(padded[:, self._in[phase]].max(axis=2))

    @staticmethod
    def _indices(neighbors: list[list[int]]) -> NDArray[np.int64]:
        """Padded to the same length with the number behind the last rank's."""
        degree = max(1, *map(len, neighbors))
        return np.array([[*ranks, *[len(neighbors)] * (degree - len(ranks))] for ranks in neighbors])


def _sampler(compute: Compute, size: int, runs: int, random: np.random.Generator) -> Callable[[], Floats]:
    """Draws the times of one step of all ranks."""
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
