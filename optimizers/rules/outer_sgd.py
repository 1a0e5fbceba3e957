"""DiLoCo's outer rule: SGD with momentum on the distance that a round has moved (arXiv 2311.08105)."""

from dataclasses import dataclass

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.checks import check_flag
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.rules.slow_momentum import is_number

__all__ = ["OuterSGD"]


@dataclass(frozen=True)
class OuterSGD:
    r"""``torch.optim.SGD`` as the outer optimizer, whose gradient is anchor - average (the "outer gradient").

    With x_{t,0} the anchor (the parameters at the start of the round), xbar the average at its end, mu the momentum
    and v the momentum buffer, v_0 = 0:

        g_t       = x_{t,0} - xbar
        v_{t+1}   = mu v_t + g_t
        x_{t+1,0} = x_{t,0} - lr (g_t + mu v_{t+1})     with ``nesterov``, else  x_{t,0} - lr v_{t+1}

    The inner learning rate does not appear, unlike in ``SlowMomentum``: the two are equal (alpha = lr, beta = mu) as
    long as the inner learning rate is constant, and differ under a schedule, where slow momentum shrinks with the rate.

    Special cases: (1, 0) adopts the average; one worker is DiLoCo with K = 1, close to Lookahead.

    Args:
        lr: outer learning rate, > 0. DiLoCo uses 0.7.
        momentum: mu, 0 <= mu < 1. DiLoCo uses 0.9.
        nesterov: look ahead along the momentum, as DiLoCo does.

    Raises:
        ConfigurationError: for values outside these ranges.
    """

    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True

    def __post_init__(self) -> None:
        if not is_number(self.lr) or self.lr <= 0:
            raise ConfigurationError(f"the outer learning rate must be a number > 0, got {self.lr!r}")
        if not is_number(self.momentum) or not 0 <= self.momentum < 1:
            raise ConfigurationError(f"the outer momentum must be a number >= 0 and < 1, got {self.momentum!r}")
        check_flag("nesterov", self.nesterov)
        if self.nesterov and self.momentum == 0:
            raise ConfigurationError("nesterov=True needs an outer momentum > 0: use nesterov=False without momentum")

    @property
    def keeps_momentum(self) -> bool:
        return self.momentum > 0

    @property
    def needs_learning_rate(self) -> bool:
        return False

    def step(
        self,
        anchor: Array,
        slow_buffer: Array | None,
        mean: Array,
        learning_rate: float,
        scratch: Array | None = None,
    ) -> None:
        if slow_buffer is None and self.lr == 1:
            array_module(anchor).copyto(anchor, mean)
            return
        gradient = np.subtract(anchor, mean, out=mean)
        if slow_buffer is None:
            gradient *= self.lr
            anchor -= gradient
            return
        slow_buffer *= self.momentum
        slow_buffer += gradient
        moved = np.multiply(
            slow_buffer,
            self.momentum if self.nesterov else self.lr,
            out=None if scratch is None else scratch[: slow_buffer.size],
        )
        if self.nesterov:
            moved += gradient
            moved *= self.lr
        anchor -= moved
