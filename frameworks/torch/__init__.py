"""Lentando for PyTorch: ``import lentando.torch as lt``."""

from lentando.comm.errors import (
    ConfigurationError,
    LaunchError,
    LentandoError,
    MismatchError,
    NonFiniteError,
    NotInitializedError,
    TransportError,
)
from lentando.comm.operations import Average, Max, Min, Sum, barrier
from lentando.comm.world import init, is_initialized, local_rank, local_size, rank, shutdown, size
from lentando.optimizers.base_algorithms import AllReduce, LocalSGD
from lentando.optimizers.period import FixedPeriod, Period, PostLocal, RoundSummary
from lentando.optimizers.slow_momentum import SlowMomentum
from lentando.torch.functions import (
    allgather,
    allgather_object,
    allreduce,
    allreduce_,
    broadcast,
    broadcast_,
    broadcast_object,
    broadcast_optimizer_state,
    broadcast_parameters,
)
from lentando.torch.optimizer import DistributedOptimizer, SlowMo

__all__ = [
    "AllReduce",
    "Average",
    "ConfigurationError",
    "DistributedOptimizer",
    "FixedPeriod",
    "LaunchError",
    "LentandoError",
    "LocalSGD",
    "Max",
    "Min",
    "MismatchError",
    "NonFiniteError",
    "NotInitializedError",
    "Period",
    "PostLocal",
    "RoundSummary",
    "SlowMo",
    "SlowMomentum",
    "Sum",
    "TransportError",
    "allgather",
    "allgather_object",
    "allreduce",
    "allreduce_",
    "barrier",
    "broadcast",
    "broadcast_",
    "broadcast_object",
    "broadcast_optimizer_state",
    "broadcast_parameters",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
]
