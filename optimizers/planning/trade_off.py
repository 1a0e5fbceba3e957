"""Choice of the period: the error that a longer period costs against the time that it saves.

The bound and its minimum are those of Wang and Joshi, "Adaptive Communication Strategies to Achieve the Best
Error-Runtime Trade-off in Local-Update SGD", MLSys 2019, arXiv 1810.08313, Theorems 1 and 2. Their constants (L, sigma)
are rarely known; ``cheap_period`` needs none of them.
"""

from dataclasses import dataclass
from math import floor, inf, sqrt

from lentando.comm.cluster import Compute
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.planning.delays import Delays
from lentando.optimizers.planning.maximum import mean_seconds
from lentando.optimizers.planning.run_time import local_sgd_seconds

__all__ = ["LONGEST_PERIOD", "Problem", "best_period", "cheap_period", "error_bound", "real_best_period"]

LONGEST_PERIOD = 1024
"""Longest period that ``cheap_period`` considers: replicas that are averaged more rarely train separate models."""


@dataclass(frozen=True)
class Problem:
    """Constants of a training run that the error bound depends on.

    Args:
        loss_gap: distance from the initial loss to its infimum, F(x_1) - F_inf > 0.
        lipschitz: Lipschitz constant of the gradient, L > 0.
        variance: variance of the stochastic gradients, sigma^2 > 0.
        learning_rate: learning rate, eta > 0.
        time_seconds: duration of the training, T > 0.

    Example:
        >>> problem = Problem(loss_gap=2.0, lipschitz=1.0, variance=1.0, learning_rate=0.08, time_seconds=3600.0)
        >>> best_period(problem, delay_seconds=1.0), problem.allows(2)
        (2, True)
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
        """Return whether the bound holds for this period: eta L + eta^2 L^2 tau (tau - 1) <= 1 (Theorem 1)."""
        step = self.learning_rate * self.lipschitz
        return step + step**2 * period * (period - 1) <= 1


def error_bound(problem: Problem, compute_seconds: float, delay_seconds: float, size: int, period: float) -> float:
    """Return an upper bound on min_k E ||grad F(x_k)||^2 after T seconds, for constant Y and D (Theorem 1):

        2 (F(x_1) - F_inf) / (eta T) * (Y + D / tau) + eta L sigma^2 / m + eta^2 L^2 sigma^2 (tau - 1)

    The first term falls with the period (more steps in the same time). The last term, the error floor, rises with it.
    The bound is proved where ``problem.allows(period)``.

    Args:
        problem: constants of the training run.
        compute_seconds: compute time of a step (Y).
        delay_seconds: delay of a communication (D).
        size: number of ranks (m).
        period: inner steps between averages, tau >= 1.

    Example:
        >>> problem = Problem(loss_gap=1.0, lipschitz=1.0, variance=1.0, learning_rate=0.1, time_seconds=100.0)
        >>> round(error_bound(problem, compute_seconds=0.1, delay_seconds=0.1, size=4, period=2), 3)
        0.065
    """  # noqa: D415 - ends in a colon, for the formula
    eta, smooth, variance = problem.learning_rate, problem.lipschitz, problem.variance
    run_time = 2 * problem.loss_gap / (eta * problem.time_seconds) * (compute_seconds + delay_seconds / period)
    return run_time + eta * smooth * variance / size + (eta * smooth) ** 2 * variance * (period - 1)


def real_best_period(problem: Problem, delay_seconds: float) -> float:
    """Return tau* = sqrt(2 (F(x_1) - F_inf) D / (eta^3 L^2 sigma^2 T)), the real period that minimises the bound.

    This is Theorem 2. The period depends neither on Y nor on the number of ranks.

    Example:
        >>> problem = Problem(loss_gap=1.0, lipschitz=1.0, variance=1.0, learning_rate=0.1, time_seconds=100.0)
        >>> round(real_best_period(problem, delay_seconds=1.0), 3)
        4.472
    """
    eta = problem.learning_rate
    return sqrt(
        2 * problem.loss_gap * delay_seconds
        / (eta**3 * problem.lipschitz**2 * problem.variance * problem.time_seconds)
    )  # fmt: skip


def best_period(problem: Problem, delay_seconds: float) -> int:
    """Return the integer period >= 1 with the smallest bound: a neighbour of tau*, because the bound is convex.

    Example:
        >>> problem = Problem(loss_gap=1.0, lipschitz=1.0, variance=1.0, learning_rate=0.1, time_seconds=100.0)
        >>> best_period(problem, delay_seconds=1.0)
        4
    """
    real = real_best_period(problem, delay_seconds)
    if real <= 1:
        return 1
    below = floor(real)
    return min(below, below + 1, key=lambda period: error_bound(problem, 0.0, delay_seconds, 1, period))


def cheap_period(compute: Compute, size: int, delays: Delays, overhead: float = 0.1) -> int | None:
    """Return the smallest period at which communication and stragglers cost at most ``overhead`` of the computation.

    That is, E[max_i Ybar_i] + D / tau <= (1 + overhead) max_i E[Y_i], because no period can save the mean compute time
    of the slowest rank. AdaComm begins with its longest period: a longer one than this would save next to no time, and
    cost accuracy. This rule of this project needs no constants of the loss. The time falls with the period, so a
    bisection finds it.

    Args:
        compute: distribution of compute times (Y).
        size: number of ranks.
        delays: delays of the operations (D).
        overhead: accepted cost as a share of the slowest rank's mean compute time, > 0.

    Returns:
        The period, or None if even ``LONGEST_PERIOD`` costs more.

    Example:
        >>> from lentando.comm.cluster import Compute
        >>> cheap_period(Compute(0.1), 8, Delays(gradient_average=0.05, outer_step=0.05), overhead=0.1)
        5
    """
    if not 0 < overhead < inf:
        raise ConfigurationError(f"overhead must be finite and > 0, got {overhead}")
    allowed = (1 + overhead) * max(mean_seconds(compute, rank) for rank in range(size))

    def is_cheap(period: int) -> bool:
        return local_sgd_seconds(compute, size, delays, period) <= allowed

    low, high = 0, 1  # too short, and perhaps long enough
    while not is_cheap(high):
        if high >= LONGEST_PERIOD:
            return None
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_cheap(middle) else (middle, high)
    return high
