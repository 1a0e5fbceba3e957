"""How long training takes before it is run: the delay model behind AdaComm, and what it says of every algorithm.

Compute times are described by ``lentando.comm.simulation.Compute``, networks by ``Network``: what is predicted here in
closed form can be simulated there, step by step, by the same description.
"""

from lentando.optimizers.measure import measure_delays
from lentando.optimizers.planning.delays import Delay, Delays, fit_delay, network_delays
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
    "Delay",
    "Delays",
    "GossipRate",
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
    "measure_delays",
    "measurement_line",
    "network_delays",
    "read_measurement",
    "real_best_period",
    "speed_up",
    "stragglers",
]
