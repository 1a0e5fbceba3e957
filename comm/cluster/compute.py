"""The compute model: how long a training step takes on each rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, inf, log, log1p, sqrt
from random import Random
from typing import Literal, TypeAlias

from lentando.comm.errors import ConfigurationError

__all__ = ["Compute", "Distribution", "StepTimes"]

Distribution: TypeAlias = Literal["constant", "exponential", "lognormal", "trace"]


@dataclass(frozen=True)
class Compute:
    """How long one training step computes, without communication; drawn anew for each step of each rank.

    Args:
        mean_seconds: mean of a step, >= 0; not with ``"trace"``, whose values are used as they are.
        distribution: ``"constant"``; ``"exponential"`` (the delay model of AdaComm, Wang and Joshi, MLSys 2019);
            ``"lognormal"``, as measured step times often are; or ``"trace"``, measured values that go round.
        stragglers: by rank, the factor by which its steps take longer.
        variation: standard deviation over mean of ``"lognormal"``.
        trace: seconds of the steps of ``"trace"``; each rank starts at its own random place.
    """

    mean_seconds: float = 0.0
    distribution: Distribution = "constant"
    stragglers: Mapping[int, float] = field(default_factory=dict, kw_only=True)
    variation: float = field(default=0.3, kw_only=True)
    trace: Sequence[float] = field(default=(), kw_only=True)

    def __post_init__(self) -> None:
        if not 0 <= self.mean_seconds < inf:
            raise ConfigurationError(f"mean_seconds must be finite and >= 0, got {self.mean_seconds}")
        if self.distribution not in ("constant", "exponential", "lognormal", "trace"):
            raise ConfigurationError(
                f"distribution must be 'constant', 'exponential', 'lognormal' or 'trace', got {self.distribution!r}"
            )
        if (self.distribution == "trace") != bool(len(self.trace)):
            raise ConfigurationError("distribution 'trace' and trace= (seconds of at least one step) go together")
        if self.distribution == "trace" and self.mean_seconds:
            raise ConfigurationError("the values of a trace are used as they are: leave mean_seconds out")
        if not 0 <= self.variation < inf:
            raise ConfigurationError(f"variation must be finite and >= 0, got {self.variation}")
        for what, values in (("trace", self.trace), ("stragglers", self.stragglers.values())):
            for value in values:
                if not 0 <= value < inf:
                    raise ConfigurationError(f"{what} must be finite and >= 0, got {value}")


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
