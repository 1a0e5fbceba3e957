"""The outer step's rule: slow momentum (Wang, Tantia, Ballas, Rabbat, "SlowMo", ICLR 2020, arXiv 1910.00643)."""

from dataclasses import dataclass
from math import isfinite
from numbers import Real

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.checks import check_flag
from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array

__all__ = ["SlowMomentum", "is_number"]

SMALLEST_LEARNING_RATE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class SlowMomentum:
    r"""SlowMo's Algorithm 1, lines 7 and 8, on the average of a round.

    With x_{t,0} the anchor (the parameters at the start of the round), xbar the average at its end, gamma_t the
    (fast) learning rate, alpha ``slow_lr``, beta ``slow_momentum`` and u the slow momentum, u_0 = 0:

        u_{t+1}   = beta u_t + (x_{t,0} - xbar) / gamma_t
        x_{t+1,0} = x_{t,0} - alpha gamma_t u_{t+1}

    With ``nesterov`` the step is along beta u_{t+1} + (x_{t,0} - xbar) / gamma_t instead. u does not depend on the
    learning rate, so schedules may change it from round to round; gamma_t is the mean of the learning rates with which
    the round's steps were taken, for each parameter group. DiLoCo's outer optimizer (arXiv 2311.08105) does not divide
    by it: that is ``OuterSGD``, which is equal to this rule only while the learning rate stays constant.

    Special cases: (1, 0) is Local SGD; (1, beta > 0) over Local SGD is BMUF; one worker with beta = 0 and slow_lr < 1
    is Lookahead.

    Args:
        slow_lr: alpha, > 0.
        slow_momentum: beta, 0 <= beta < 1.
        nesterov: look ahead along the momentum.

    Raises:
        ConfigurationError: for values outside these ranges.
    """

    slow_lr: float = 1.0
    slow_momentum: float = 0.5
    nesterov: bool = False

    def __post_init__(self) -> None:
        if not is_number(self.slow_lr) or self.slow_lr <= 0:
            raise ConfigurationError(f"slow_lr must be a number > 0, got {self.slow_lr!r}")
        if not is_number(self.slow_momentum) or not 0 <= self.slow_momentum < 1:
            raise ConfigurationError(f"slow_momentum must be a number >= 0 and < 1, got {self.slow_momentum!r}")
        check_flag("nesterov", self.nesterov)
        if self.nesterov and self.slow_momentum == 0:
            raise ConfigurationError(
                "nesterov=True needs slow_momentum > 0: without momentum there is nothing to look along"
            )

    @property
    def keeps_momentum(self) -> bool:
        return self.slow_momentum > 0

    @property
    def needs_learning_rate(self) -> bool:
        return self.slow_momentum > 0  # the momentum is kept in units of distance divided by the rate

    def step(
        self,
        anchor: Array,
        slow_buffer: Array | None,
        mean: Array,
        learning_rate: float,
        scratch: Array | None = None,
    ) -> None:
        """Take one outer step. ``anchor`` becomes x_{t+1,0}, in place, and ``slow_buffer`` u_{t+1}.

        A round at learning rate 0 has taught nothing about the direction: the average is adopted and u stays. So does a
        round at a learning rate too small for float32, where 1 / gamma would overflow.

        Args:
            anchor: x_{t,0}, float32 or float64, one-dimensional.
            slow_buffer: u_t, like ``anchor``; None if ``slow_momentum`` is 0, when u is never used.
            mean: xbar_{t,tau}, like ``anchor``; used up.
            learning_rate: gamma_t, the mean over the round's inner steps.
            scratch: memory like ``anchor``, or longer, which spares an allocation.
        """
        if abs(learning_rate) < SMALLEST_LEARNING_RATE:
            array_module(anchor).copyto(anchor, mean)
            return
        # The step is written as (anchor - mean) + the carried momentum, times alpha: gamma cancels in the first term,
        # so that only u divides by it. With alpha = 1 the anchor cancels too, and xbar minus the momentum is left:
        # with no momentum, the average itself, to the bit.
        alpha, beta, gamma, u = self.slow_lr, self.slow_momentum, learning_rate, slow_buffer
        if u is None:
            if alpha == 1:
                array_module(anchor).copyto(anchor, mean)
            else:
                moved = np.subtract(anchor, mean, out=mean)
                moved *= alpha
                anchor -= moved
            return
        carried = np.multiply(u, beta * gamma, out=None if scratch is None else scratch[: u.size])
        moved = np.subtract(anchor, mean, out=anchor if alpha == 1 else mean)  # of the two, what is not needed again
        if self.nesterov:
            carried += moved
            carried *= beta
        if alpha != 1:
            carried += moved
            carried *= alpha
        moved /= gamma
        u *= beta
        u += moved
        if alpha == 1:
            np.subtract(mean, carried, out=anchor)
        else:
            anchor -= carried


def is_number(value: object) -> bool:
    """Whether a setting is a finite real number."""
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)
