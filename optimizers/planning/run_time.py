"""How long a training step takes with each algorithm, and how much faster that is than synchronous SGD.

Y is the compute time of a step, D the delay of a communication, tau the period (Wang and Joshi, MLSys 2019, arXiv
1810.08313, section 3). All times are in seconds per inner step of every rank, so that they compare as they are.
"""

from lentando.comm.cluster.compute import Compute
from lentando.comm.errors import ConfigurationError
from lentando.optimizers.planning.delays import Delays
from lentando.optimizers.planning.maximum import expected_maximum_seconds

__all__ = ["all_reduce_seconds", "local_sgd_seconds", "speed_up"]


def all_reduce_seconds(compute: Compute, size: int, delays: Delays) -> float:
    """Synchronous SGD: E[T] = E[max_i Y_i] + D. Exact for independent Y and constant D: every step is a barrier."""
    return expected_maximum_seconds(compute, size) + delays.gradient_average


def local_sgd_seconds(
    compute: Compute, size: int, delays: Delays, period: int, *, slow_momentum: bool = False
) -> float:
    """Local SGD, or SlowMo over it: E[T] = E[max_i Ybar_i] + D / period, Ybar_i the mean over ``period`` steps.

    Exact for Y independent between steps and constant D: between two barriers lie ``period`` steps of each rank.
    """
    outer = delays.outer_step + (delays.slow_momentum if slow_momentum else 0.0)
    return expected_maximum_seconds(compute, size, period) + outer / period


def speed_up(compute_seconds: float, delay_seconds: float, period: float) -> float:
    """Of Local SGD over synchronous SGD for constant Y and D: (Y + D) / (Y + D / period) = (1 + a) / (1 + a / period).

    a = D / Y is the ratio of communication to computation; 1 + a is the limit for long periods. Exact for constant
    times; random ones gain more, because averages over a period straggle less.

    Args:
        compute_seconds: Y, > 0.
        delay_seconds: D, >= 0.
        period: tau, >= 1.
    """
    if not (compute_seconds > 0 and delay_seconds >= 0 and period >= 1):
        raise ConfigurationError(
            f"expected compute_seconds > 0, delay_seconds >= 0 and period >= 1, got {compute_seconds}, "
            f"{delay_seconds} and {period}"
        )
    return (compute_seconds + delay_seconds) / (compute_seconds + delay_seconds / period)
