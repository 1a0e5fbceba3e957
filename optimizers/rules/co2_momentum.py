"""Slow momentum with the two measures of CO2 against what is late (Sun et al., ICLR 2024, arXiv 2401.16265)."""

from dataclasses import dataclass

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.checks import is_number
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.rules.slow_momentum import SMALLEST_LEARNING_RATE, SlowMomentum

__all__ = ["CO2Momentum"]


@dataclass(frozen=True)
class CO2Momentum(SlowMomentum):
    r"""Slow momentum with a staleness gap penalty Lambda and with clipping at phi.

    CO2 takes the outer step of SlowMo from an average that is a round old, which is ``delay=period`` here. Its two
    measures against what is late change lines 7 and 8 of SlowMo's Algorithm 1 for each element (``SlowMomentum`` has
    the same symbols):

        v         = beta u_t + (x_{t,0} - xbar) / (Lambda gamma_t)
        u_{t+1}   = min(max(v, -phi), phi)
        x_{t+1,0} = x_{t,0} - alpha gamma_t u_{t+1}

    Lambda is a constant, as ``co2_gap_penalty`` of the authors' program (github.com/weigao266/fairscale-CO2), where it
    is 1 by default; their paper derives it from how far the parameters move in a round, in its section about the
    staleness gap. Their program has momenta in units of the parameters, without gamma_t, and loses the clipped values;
    while the learning rate is constant, the rules are equal with its threshold divided by gamma_t.

    Args:
        slow_lr: slow learning rate alpha, > 0.
        slow_momentum: coefficient beta of the slow momentum, 0 <= beta < 1.
        nesterov: must be False, because the step would not be along the clipped momentum.
        gap_penalty: Lambda, >= 1, by which the distance that a round has moved is divided.
        momentum_clip: largest magnitude phi, > 0, of an element of the slow momentum, in units of a gradient; None for
            no limit.

    Raises:
        ConfigurationError: if a value is out of its range.

    Example:
        >>> import numpy as np
        >>> anchor, mean, slow_buffer = np.array([1.0, 2.0]), np.array([0.5, 1.75]), np.zeros(2)
        >>> rule = CO2Momentum(gap_penalty=2.0, momentum_clip=1.5)
        >>> rule.step(anchor, slow_buffer, mean, learning_rate=0.125)
        >>> slow_buffer.tolist(), anchor.tolist()
        ([1.5, 1.0], [0.8125, 1.875])
    """

    gap_penalty: float = 1.0
    momentum_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nesterov:
            raise ConfigurationError("gap_penalty and momentum_clip are possible with nesterov=False only")
        if not (is_number(self.gap_penalty) and self.gap_penalty >= 1):
            raise ConfigurationError(f"gap_penalty must be a number >= 1, got {self.gap_penalty!r}")
        if self.momentum_clip is None:
            return
        if not (is_number(self.momentum_clip) and self.momentum_clip > 0):
            raise ConfigurationError(f"momentum_clip must be a number > 0 or None, got {self.momentum_clip!r}")
        if self.slow_momentum == 0:
            raise ConfigurationError("momentum_clip limits the slow momentum, and slow_momentum=0 has none")

    def step(
        self,
        anchor: Array,
        slow_buffer: Array | None,
        mean: Array,
        learning_rate: float,
        scratch: Array | None = None,
    ) -> None:
        """Take one outer step in place, as ``SlowMomentum.step``; ``slow_buffer`` becomes u_{t+1}."""
        gamma, u = learning_rate, slow_buffer
        if abs(gamma) < SMALLEST_LEARNING_RATE:
            array_module(anchor).copyto(anchor, mean)
            return
        moved = np.subtract(anchor, mean, out=mean)
        if u is None:
            moved *= self.slow_lr / self.gap_penalty
            anchor -= moved
            return
        moved /= self.gap_penalty * gamma
        u *= self.slow_momentum
        u += moved
        if self.momentum_clip is not None:
            np.maximum(u, -self.momentum_clip, out=u)
            np.minimum(u, self.momentum_clip, out=u)
        anchor -= np.multiply(u, self.slow_lr * gamma, out=moved)
