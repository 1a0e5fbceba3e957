"""Time per training step of each algorithm, and the speed-up over synchronous SGD.

Y is the compute time of a step, D the delay of a communication, tau the period (Wang and Joshi, MLSys 2019, arXiv
1810.08313, section 3). All times are in seconds per inner step of every rank, so that they can be compared directly.
"""

from lentando.comm.cluster import Compute
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.planning.delays import Delays
from lentando.optimizers.planning.maximum import expected_maximum_seconds

__all__ = ["all_reduce_seconds", "local_sgd_seconds", "speed_up"]


def all_reduce_seconds(compute: Compute, size: int, delays: Delays) -> float:
    """Return the time per step of synchronous SGD, E[T] = E[max_i Y_i] + D.

    Exact for independent Y and constant D, because every step is a barrier.

    Example:
        >>> from lentando.comm.cluster import Compute
        >>> all_reduce_seconds(Compute(0.5), 8, Delays(gradient_average=0.25, outer_step=0.25))
        0.75
    """
    return expected_maximum_seconds(compute, size) + delays.gradient_average


def local_sgd_seconds(
    compute: Compute, size: int, delays: Delays, period: int, *, slow_momentum: bool = False
) -> float:
    """Return the time per step of Local SGD or SlowMo, E[T] = E[max_i Ybar_i] + D / period.

    Ybar_i is the mean over ``period`` steps. Exact for Y independent between steps and constant D, because each rank
    takes ``period`` steps between two barriers.

    Example:
        >>> from lentando.comm.cluster import Compute
        >>> local_sgd_seconds(Compute(0.5), 8, Delays(gradient_average=0.25, outer_step=0.25), period=4)
        0.5625
    """
    outer = delays.outer_step + (delays.slow_momentum if slow_momentum else 0.0)
    return expected_maximum_seconds(compute, size, period) + outer / period


def speed_up(compute_seconds: float, delay_seconds: float, period: float) -> float:
    """Return the speed-up of Local SGD over synchronous SGD for constant Y and D, (1 + a) / (1 + a / period).

    a = D / Y is the ratio of communication to computation; 1 + a is the limit for long periods. Exact for constant
    times. Random times gain more, because means over a period vary less.

    Args:
        compute_seconds: compute time of a step (Y), > 0.
        delay_seconds: delay of a communication (D), >= 0.
        period: inner steps between averages (tau), >= 1.

    Example:
        >>> speed_up(compute_seconds=1.0, delay_seconds=1.0, period=4)
        1.6
    """
    if not (compute_seconds > 0 and delay_seconds >= 0 and period >= 1):
        raise ConfigurationError(
            f"expected compute_seconds > 0, delay_seconds >= 0 and period >= 1, got {compute_seconds}, "
            f"{delay_seconds} and {period}"
        )
    return (compute_seconds + delay_seconds) / (compute_seconds + delay_seconds / period)
