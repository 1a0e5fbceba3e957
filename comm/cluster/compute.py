"""The compute model: how long a training step takes on each rank."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, TypeAlias

from lentando.comm.errors import ConfigurationError

__all__ = ["Compute", "Distribution"]

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
