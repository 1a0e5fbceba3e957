"""DiLoCo's outer rule: SGD with momentum on the distance that a round has moved (arXiv 2311.08105)."""

from dataclasses import dataclass

import numpy as np

from lentando.comm.array_module import array_module
from lentando.comm.transport import Array
from lentando.optimizers.rules.outer_rule import check_outer_arguments

__all__ = ["OuterSGD"]


@dataclass(frozen=True)
class OuterSGD:
    r"""``torch.optim.SGD`` as the outer optimizer, whose gradient is anchor - average (the "outer gradient").

    With x_{t,0} the anchor (the parameters at the start of the round), xbar the average at its end, mu the momentum
    and v the momentum buffer, v_0 = 0:

        g_t       = x_{t,0} - xbar
        v_{t+1}   = mu v_t + g_t
        x_{t+1,0} = x_{t,0} - lr (g_t + mu v_{t+1})     with ``nesterov``, else  x_{t,0} - lr v_{t+1}

    Unlike in ``SlowMomentum``, the inner learning rate does not appear. The two rules are equal (alpha = lr, beta = mu)
    while the inner learning rate is constant. They differ under a schedule, where slow momentum shrinks with the rate.

    Special cases: with lr = 1 and mu = 0 the average is adopted. One worker is DiLoCo with K = 1, which is close to
    Lookahead.

    Args:
        lr: outer learning rate, > 0. DiLoCo uses 0.7.
        momentum: momentum coefficient mu, 0 <= mu < 1. DiLoCo uses 0.9.
        nesterov: whether the momentum is Nesterov's, as in DiLoCo.

    Raises:
        ConfigurationError: if a value is out of its range.

    Example:
        >>> import numpy as np
        >>> anchor, mean, momentum = np.array([1.0, 2.0]), np.array([0.5, 2.0]), np.zeros(2)
        >>> OuterSGD(lr=0.5, momentum=0.5).step(anchor, momentum, mean, learning_rate=0.1)
        >>> anchor.tolist(), momentum.tolist()
        ([0.625, 2.0], [0.5, 0.0])
    """

    lr: float = 0.7
    momentum: float = 0.9
    nesterov: bool = True

    def __post_init__(self) -> None:
        check_outer_arguments(
            "the outer learning rate",
            self.lr,
            "the outer momentum",
            self.momentum,
            self.nesterov,
            "an outer momentum > 0: use nesterov=False without momentum",
        )

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
