"""Lentando for PyTorch: ``import lentando.torch as lt``."""

import torch as _torch

from lentando.comm.errors import (
    CheckpointError,
    ConfigurationError,
    LaunchError,
    LentandoError,
    MismatchError,
    NonFiniteError,
    NotInitializedError,
    RankLostError,
    TransportError,
)
from lentando.comm.operations import Average, Max, Min, Sum, barrier
from lentando.comm.process_state import ProcessState, register_process_state
from lentando.comm.topology import (
    BipartiteExponential,
    Complete,
    FromGraph,
    FromMatrix,
    Hybrid,
    Hypercube,
    NodeAware,
    OnePeerExponential,
    PPeerExponential,
    Ring,
    StaticExponential,
    Torus,
)
from lentando.comm.world import init, is_initialized, local_rank, local_size, rank, shutdown, size
from lentando.optimizers.checkpoint.loading import load
from lentando.optimizers.checkpoint.on_signal import save_on_signal
from lentando.optimizers.checkpoint.saving import save
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule
from lentando.optimizers.rules.adacomm import AdaptivePeriod
from lentando.optimizers.rules.base_algorithms import AllReduce, LocalSGD
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.partial_average import join
from lentando.optimizers.rules.period import Decision, FixedPeriod, Period, PostLocal, RoundSummary
from lentando.optimizers.rules.slow_momentum import SlowMomentum
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
from lentando.torch.layers import layers
from lentando.torch.methods import AdaComm, DiLoCo, SlowMo
from lentando.torch.optimizer import DistributedOptimizer

__all__ = [
    "DPSGD",
    "OSGP",
    "SGP",
    "AdaComm",
    "AdaptivePeriod",
    "AllReduce",
    "Average",
    "BipartiteExponential",
    "CheckpointError",
    "Complete",
    "ConfigurationError",
    "Decision",
    "DiLoCo",
    "DistributedOptimizer",
    "FixedPeriod",
    "FromGraph",
    "FromMatrix",
    "Hybrid",
    "Hypercube",
    "LaunchError",
    "LentandoError",
    "LocalSGD",
    "Max",
    "Min",
    "MismatchError",
    "NodeAware",
    "NonFiniteError",
    "NotInitializedError",
    "OnePeerExponential",
    "OuterSGD",
    "PPeerExponential",
    "Period",
    "PostLocal",
    "RankLostError",
    "Ring",
    "RoundSummary",
    "SlowMo",
    "SlowMomentum",
    "StaticExponential",
    "Sum",
    "Torus",
    "TransportError",
    "WeightMap",
    "WeightRule",
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
    "join",
    "layers",
    "load",
    "local_rank",
    "local_size",
    "rank",
    "save",
    "save_on_signal",
    "shutdown",
    "size",
]

# In a simulation, ranks share a process: each has its own random generator all the same. A program seeds it itself.
register_process_state("torch", ProcessState(_torch.get_rng_state, _torch.set_rng_state, lambda seed, rank: None))
