"""Predicted training time of every algorithm, by the delay model behind AdaComm.

``Compute`` describes compute times and ``Network`` a network. The simulator takes the same two descriptions, so that
what is predicted here in closed form can also be simulated step by step.

Example:
    >>> from lentando.comm.cluster import Compute, Network
    >>> from lentando.optimizers.planning import all_reduce_seconds, cheap_period, local_sgd_seconds, network_delays
    >>> compute = Compute(0.18, "exponential")  # 180 ms per step on average
    >>> network = Network(50e-6, 1.25e9)  # 50 us, 10 Gbit/s
    >>> delays = network_delays(network, size=32, model_bytes=102_400_000)
    >>> round(all_reduce_seconds(compute, 32, delays), 3)
    0.893
    >>> round(local_sgd_seconds(compute, 32, delays, period=12), 3)
    0.318
    >>> cheap_period(compute, 32, delays, overhead=0.5)
    25
"""

from lentando.optimizers.planning.delays import Delays, LinearDelay, fit_delay, network_delays
from lentando.optimizers.planning.estimate import ComputeEstimate, as_compute, estimate_compute, stragglers
from lentando.optimizers.planning.gossip_rate import GossipRate, gossip_rate
from lentando.optimizers.planning.maximum import (
    deviation_seconds,
    expected_maximum_seconds,
    harmonic_number,
    mean_seconds,
)
from lentando.optimizers.planning.records import Measurement, append_measurement, measurement_line, read_measurement
from lentando.optimizers.planning.run_time import all_reduce_seconds, local_sgd_seconds, speed_up
from lentando.optimizers.planning.trade_off import (
    LONGEST_PERIOD,
    Problem,
    best_period,
    cheap_period,
    error_bound,
    real_best_period,
)

__all__ = [
    "LONGEST_PERIOD",
    "ComputeEstimate",
    "Delays",
    "GossipRate",
    "LinearDelay",
    "Measurement",
    "Problem",
    "all_reduce_seconds",
    "append_measurement",
    "as_compute",
    "best_period",
    "cheap_period",
    "deviation_seconds",
    "error_bound",
    "estimate_compute",
    "expected_maximum_seconds",
    "fit_delay",
    "gossip_rate",
    "harmonic_number",
    "local_sgd_seconds",
    "mean_seconds",
    "measurement_line",
    "network_delays",
    "read_measurement",
    "real_best_period",
    "speed_up",
    "stragglers",
]
