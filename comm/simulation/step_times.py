"""The times of the steps of a running simulation, drawn from its compute model."""

from math import exp, log, log1p, sqrt
from random import Random

from lentando.comm.cluster import Compute

__all__ = ["StepTimes"]


class StepTimes:
    """The times of one rank's steps, one after the other.

    Args:
        compute: the model.
        rank: whose steps.
        seed: of the simulation; each rank has its own stream.
        slowness: factor by which they take longer, beside the model's own.
    """

    def __init__(self, compute: Compute, rank: int, seed: int, slowness: float = 1.0) -> None:
        self._compute = compute
        self._factor = compute.stragglers.get(rank, 1.0) * slowness
        self._random = Random(f"compute {seed} {rank}")
        self._place = self._random.randrange(len(compute.trace)) if compute.trace else 0
        # Of a lognormal variable with mean m and standard deviation v m: the logarithm's parameters.
        variance = log1p(compute.variation**2)
        self._sigma, self._shift = sqrt(variance), -variance / 2

    def next_seconds(self) -> float:
        """How long the next step computes."""
        compute = self._compute
        if compute.distribution == "trace":
            seconds = compute.trace[self._place]
            self._place = (self._place + 1) % len(compute.trace)
        elif compute.distribution == "exponential":
            seconds = -compute.mean_seconds * log(1 - self._random.random())
        elif compute.distribution == "lognormal":
            seconds = compute.mean_seconds * exp(self._random.normalvariate(self._shift, self._sigma))
        else:
            seconds = compute.mean_seconds
        return seconds * self._factor
