"""The outer rule of SlowMo: slow momentum (Wang, Tantia, Ballas, Rabbat, "SlowMo", ICLR 2020, arXiv 1910.00643)."""

from dataclasses import dataclass

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.transport import Array
from lentando.optimizers.rules.outer_rule import check_outer_arguments

__all__ = ["SlowMomentum"]

SMALLEST_LEARNING_RATE = float(np.finfo(np.float32).tiny)


@dataclass(frozen=True)
class SlowMomentum:
    r"""SlowMo's Algorithm 1, lines 7 and 8, on the average of a round.

    With x_{t,0} the anchor (the parameters at the start of the round), xbar the average at its end, gamma_t the
    (fast) learning rate, alpha ``slow_lr``, beta ``slow_momentum`` and u the slow momentum, u_0 = 0:

        u_{t+1}   = beta u_t + (x_{t,0} - xbar) / gamma_t
        x_{t+1,0} = x_{t,0} - alpha gamma_t u_{t+1}

    With ``nesterov`` the step is along beta u_{t+1} + (x_{t,0} - xbar) / gamma_t instead. u does not depend on the
    learning rate, so schedules may change the rate from round to round; gamma_t is the mean of the learning rates of
    the round's steps, for each parameter group. DiLoCo's outer optimizer (arXiv 2311.08105) does not divide by it: that
    is ``OuterSGD``, which is equal to this rule only while the learning rate stays constant.

    Special cases of (slow_lr, slow_momentum): (1, 0) is Local SGD; (1, beta > 0) over Local SGD is BMUF; one worker
    with beta = 0 and slow_lr < 1 is Lookahead.

    Args:
        slow_lr: slow learning rate alpha, > 0.
        slow_momentum: coefficient beta of the slow momentum, 0 <= beta < 1.
        nesterov: whether the momentum is Nesterov's.

    Raises:
        ConfigurationError: if a value is out of its range.

    Example:
        >>> import numpy as np
        >>> anchor, mean, slow_buffer = np.array([1.0, 2.0]), np.array([0.5, 2.0]), np.zeros(2)
        >>> SlowMomentum(slow_lr=1.0, slow_momentum=0.5).step(anchor, slow_buffer, mean, learning_rate=0.125)
        >>> anchor.tolist(), slow_buffer.tolist()
        ([0.5, 2.0], [4.0, 0.0])
    """

    slow_lr: float = 1.0
    slow_momentum: float = 0.5
    nesterov: bool = False

    def __post_init__(self) -> None:
        check_outer_arguments(
            "slow_lr",
            self.slow_lr,
            "slow_momentum",
            self.slow_momentum,
            self.nesterov,
            "slow_momentum > 0: use nesterov=False without momentum",
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
        """Take one outer step in place: ``anchor`` becomes x_{t+1,0}, and ``slow_buffer`` becomes u_{t+1}.

        A round at learning rate 0 contains no information about the direction: the average is adopted and u is left as
        it is. The same is done at a learning rate too small for float32, where 1 / gamma would overflow.

        Args:
            anchor: parameters x_{t,0}, a one-dimensional array of float32 or float64.
            slow_buffer: slow momentum u_t, an array like ``anchor``; None if ``slow_momentum`` is 0, when u is not
                used.
            mean: average xbar_{t,tau}, an array like ``anchor``; overwritten.
            learning_rate: gamma_t, mean over the round's inner steps.
            scratch: memory of the dtype of ``anchor``, at least as long, which saves an allocation; or None.
        """
        if abs(learning_rate) < SMALLEST_LEARNING_RATE:
            array_module(anchor).copyto(anchor, mean)
            return
        # The step is computed as alpha ((anchor - mean) + carried momentum): gamma cancels in the first term, so that
        # only u is divided by it. With alpha = 1 the anchor cancels too, and what remains is xbar minus the momentum:
        # without momentum, exactly the average.
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
        moved = np.subtract(anchor, mean, out=anchor if alpha == 1 else mean)  # the array that is not needed again
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
