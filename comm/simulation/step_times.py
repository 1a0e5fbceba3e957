"""Durations of the training steps of a running simulation, drawn from its compute model."""

from math import exp, log, log1p, sqrt
from random import Random

from lentando.comm.cluster import Compute

__all__ = ["StepTimes"]


class StepTimes:
    """The durations of one rank's training steps.

    Args:
        compute: compute model.
        rank: number of the rank.
        seed: seed of the simulation. Each rank has its own stream of random numbers.
        slowness: factor by which the steps take longer, in addition to the rank's factor in the model.
    """

    def __init__(self, compute: Compute, rank: int, seed: int, slowness: float = 1.0) -> None:
        self._compute = compute
        self._factor = compute.stragglers.get(rank, 1.0) * slowness
        self._random = Random(f"compute {seed} {rank}")
        self._position = self._random.randrange(len(compute.trace)) if compute.trace else 0
        # A lognormal variable with mean m and standard deviation v m is m exp(normal(shift, sigma)).
        variance = log1p(compute.variation**2)
        self._sigma, self._shift = sqrt(variance), -variance / 2

    def next_seconds(self) -> float:
        """Return the duration of the next step, in seconds."""
        compute = self._compute
        if compute.distribution == "trace":
            seconds = compute.trace[self._position]
            self._position = (self._position + 1) % len(compute.trace)
        elif compute.distribution == "exponential":
            seconds = -compute.mean_seconds * log(1 - self._random.random())
        elif compute.distribution == "lognormal":
            seconds = compute.mean_seconds * exp(self._random.normalvariate(self._shift, self._sigma))
        else:
            seconds = compute.mean_seconds
        return seconds * self._factor
