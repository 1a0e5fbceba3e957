"""Lentando for TensorFlow and Keras 3: ``import lentando.tensorflow as lt``."""

import tensorflow as _tf  # noqa: ICN001 - no name of this package

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
from lentando.tensorflow.callbacks import (
    AveragedModelCallback,
    BroadcastGlobalVariablesCallback,
    LentandoCallback,
    MetricAverageCallback,
)
from lentando.tensorflow.functions import (
    DistributedGradientTape,
    allgather,
    allgather_object,
    allreduce,
    broadcast,
    broadcast_object,
    broadcast_variables,
)
from lentando.tensorflow.methods import AdaComm, DiLoCo, SlowMo
from lentando.tensorflow.model_layers import layers
from lentando.tensorflow.optimizer import DistributedOptimizer
from lentando.tensorflow.original_errors import original_errors

__all__ = [
    "DPSGD",
    "OSGP",
    "SGP",
    "AdaComm",
    "AdaptivePeriod",
    "AllReduce",
    "Average",
    "AveragedModelCallback",
    "BipartiteExponential",
    "BroadcastGlobalVariablesCallback",
    "CheckpointError",
    "Complete",
    "ConfigurationError",
    "Decision",
    "DiLoCo",
    "DistributedGradientTape",
    "DistributedOptimizer",
    "FixedPeriod",
    "FromGraph",
    "FromMatrix",
    "Hybrid",
    "Hypercube",
    "LaunchError",
    "LentandoCallback",
    "LentandoError",
    "LocalSGD",
    "Max",
    "MetricAverageCallback",
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
    "barrier",
    "broadcast",
    "broadcast_object",
    "broadcast_variables",
    "init",
    "is_initialized",
    "join",
    "layers",
    "load",
    "local_rank",
    "local_size",
    "original_errors",
    "rank",
    "save",
    "save_on_signal",
    "shutdown",
    "size",
]

# In a simulation, ranks share a process: each has its own global generator all the same. A program seeds it itself.
# Keras draws its seeds from Python's generator, of which each simulated rank has its own too.
register_process_state(
    "tensorflow",
    ProcessState(
        _tf.random.get_global_generator,
        _tf.random.set_global_generator,
        lambda seed, rank: _tf.random.set_global_generator(_tf.random.Generator.from_seed([seed, rank])),
    ),
)
