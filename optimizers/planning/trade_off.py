"""Which period to choose: the error that a longer one costs against the time that it saves.

The bound and its minimum are those of Wang and Joshi, "Adaptive Communication Strategies to Achieve the Best
Error-Runtime Trade-off in Local-Update SGD", MLSys 2019, arXiv 1810.08313, Theorems 1 and 2. Their constants (L, sigma)
are rarely known; ``cheap_period`` needs none of them.
"""

from dataclasses import dataclass
from math import floor, inf, sqrt

from lentando.comm.cluster.compute import Compute
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.planning.delays import Delays
from lentando.optimizers.planning.maximum import mean_seconds
from lentando.optimizers.planning.run_time import local_sgd_seconds

__all__ = ["LONGEST_PERIOD", "Problem", "best_period", "cheap_period", "error_bound", "real_best_period"]

LONGEST_PERIOD = 1024
"""``cheap_period`` looks no further: replicas that meet more rarely are hardly one training."""


@dataclass(frozen=True)
class Problem:
    """What the bound needs to know of a training.

    Args:
        loss_gap: F(x_1) - F_inf, how far the loss can fall, > 0.
        lipschitz: L, of the gradient, > 0.
        variance: sigma^2, of the stochastic gradients, > 0.
        learning_rate: eta, > 0.
        time_seconds: T, how long the training lasts, > 0.
    """

    loss_gap: float
    lipschitz: float
    variance: float
    learning_rate: float
    time_seconds: float

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if not 0 < value < inf:
                raise ConfigurationError(f"{name} must be finite and > 0, got {value}")

    def allows(self, period: float) -> bool:
        """Whether the bound holds for this period: eta L + eta^2 L^2 tau (tau - 1) <= 1 (Theorem 1)."""
        step = self.learning_rate * self.lipschitz
        return step + step**2 * period * (period - 1) <= 1


def error_bound(problem: Problem, compute_seconds: float, delay_seconds: float, size: int, period: float) -> float:
    """An upper bound on min_k E ||grad F(x_k)||^2 after T seconds, for constant Y and D (Theorem 1):

        2 (F(x_1) - F_inf) / (eta T) * (Y + D / tau) + eta L sigma^2 / m + eta^2 L^2 sigma^2 (tau - 1)

    The first term falls with the period (more steps in the same time), the last is the error floor that it raises. It
    is proved where ``problem.allows(period)``.

    Args:
        problem: the constants.
        compute_seconds: Y.
        delay_seconds: D.
        size: number of ranks (m).
        period: tau >= 1.
    """  # noqa: D415 - ends in a colon, for the formula
    eta, smooth, variance = problem.learning_rate, problem.lipschitz, problem.variance
    run_time = 2 * problem.loss_gap / (eta * problem.time_seconds) * (compute_seconds + delay_seconds / period)
    return run_time + eta * smooth * variance / size + (eta * smooth) ** 2 * variance * (period - 1)


def real_best_period(problem: Problem, delay_seconds: float) -> float:
    """tau* = sqrt(2 (F(x_1) - F_inf) D / (eta^3 L^2 sigma^2 T)), the minimum of the bound over real periods > 0.

    Theorem 2. It does not depend on Y nor on the number of ranks.
    """
    eta = problem.learning_rate
    return sqrt(
        2 * problem.loss_gap * delay_seconds
        / (eta**3 * problem.lipschitz**2 * problem.variance * problem.time_seconds)
    )  # fmt: skip


def best_period(problem: Problem, delay_seconds: float) -> int:
    """The integer period >= 1 with the smallest bound: one of tau*'s two neighbours, because the bound is convex."""
    real = real_best_period(problem, delay_seconds)
    if real <= 1:
        return 1
    below = floor(real)
    return min(below, below + 1, key=lambda period: error_bound(problem, 0.0, delay_seconds, 1, period))


def cheap_period(compute: Compute, size: int, delays: Delays, overhead: float = 0.1) -> int | None:
    """The smallest period at which communication and straggling cost at most ``overhead`` times the computation.

    That is, E[max_i Ybar_i] + D / tau <= (1 + overhead) max_i E[Y_i]: the slowest rank's own mean is what no period
    can save. AdaComm begins with its longest period: a longer one than this would save next to no time, and cost
    accuracy. A rule of this project, which needs no constants of the loss; the time falls with the period, so a
    bisection finds it.

    Args:
        compute: Y.
        size: number of ranks.
        delays: D.
        overhead: > 0.

    Returns:
        The period, or None if even ``LONGEST_PERIOD`` costs more.
    """
    if not 0 < overhead < inf:
        raise ConfigurationError(f"overhead must be finite and > 0, got {overhead}")
    allowed = (1 + overhead) * max(mean_seconds(compute, rank) for rank in range(size))

    def is_cheap(period: int) -> bool:
        return local_sgd_seconds(compute, size, delays, period) <= allowed

    low, high = 0, 1  # not cheap, perhaps cheap
    while not is_cheap(high):
        if high >= LONGEST_PERIOD:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_cheap(middle) else (middle, high)
    return high
