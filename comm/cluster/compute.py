"""The compute model: how long a training step takes on each rank, without communication."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Literal, TypeAlias

from lentando.comm.errors import ConfigurationError

__all__ = ["Compute", "Distribution"]

Distribution: TypeAlias = Literal["constant", "exponential", "lognormal", "trace"]


@dataclass(frozen=True)
class Compute:
    """The distribution of the compute time of a training step. Each step of each rank draws from it independently.

    Args:
        mean_seconds: mean time of a step, >= 0. Not given with ``"trace"``, whose values are used as they are.
        distribution: ``"constant"``; ``"exponential"`` (the delay model of AdaComm, Wang and Joshi, MLSys 2019);
            ``"lognormal"``, which measured step times often follow; or ``"trace"``, measured values that are repeated.
        stragglers: factor by which the steps of a rank take longer, for some ranks.
        variation: standard deviation divided by the mean of ``"lognormal"``.
        trace: step times of ``"trace"``, in seconds. Each rank starts at a random position of its own.

    Raises:
        ConfigurationError: for values outside these ranges, or arguments that exclude each other.

    Example:
        >>> from lentando.comm.cluster import Compute
        >>> from lentando.comm.simulation import simulate
        >>> compute = Compute(0.18, stragglers={3: 1.5})  # 180 ms per step, on rank 3 half as long again
        >>> def train_one_step(transport):
        ...     transport.compute()
        ...     return round(transport.clock(), 3)
        >>> simulate(train_one_step, 4, compute=compute)
        [0.18, 0.18, 0.18, 0.27]
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
