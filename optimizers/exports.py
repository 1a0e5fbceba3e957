"""The names that users write with any framework, exported by ``lentando.optimizers`` and by the framework packages."""

from lentando.comm.build_flags import (
    ccl_built,
    cuda_built,
    ddl_built,
    gloo_built,
    gloo_enabled,
    mpi_built,
    mpi_enabled,
    mpi_threads_supported,
    nccl_built,
    rocm_built,
)
from lentando.comm.collectives import Algorithm
from lentando.comm.errors import (
    CheckpointError,
    ConfigurationError,
    DeadlockError,
    HorovodInternalError,
    HostsUpdatedInterrupt,
    LaunchError,
    LentandoError,
    MismatchError,
    NonFiniteError,
    NotInitializedError,
    RankLostError,
    SimulationError,
    TransportError,
    UnsupportedOperationError,
)
from lentando.comm.operations import Adasum, Average, Max, Min, Op, Product, Sum, barrier, start_timeline, stop_timeline
from lentando.comm.process_sets import ProcessSet, add_process_set, global_process_set, remove_process_set
from lentando.comm.topology import (
    BipartiteExponential,
    Circulant,
    Complete,
    FromGraph,
    FromMatrix,
    GraphSequence,
    Hybrid,
    Hypercube,
    NodeAware,
    OnePeerExponential,
    OnePeerHypercube,
    Peers,
    PPeerExponential,
    Ring,
    StaticExponential,
    Stochasticity,
    Topology,
    Torus,
    check_graphs,
    second_modulus,
    stochasticity,
)
from lentando.comm.world import (
    cross_rank,
    cross_size,
    init,
    is_homogeneous,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)
from lentando.optimizers.checkpoint.loading import OptimizerStateChoice, load
from lentando.optimizers.checkpoint.on_signal import save_on_signal
from lentando.optimizers.checkpoint.saving import save
from lentando.optimizers.checkpoint.weight_map import WeightMap, WeightRule
from lentando.optimizers.methods import adacomm, diloco, slowmo
from lentando.optimizers.replica.between_steps import BaseState
from lentando.optimizers.replica.stopping import StopHandle
from lentando.optimizers.replica.uneven_data import Joinable, join
from lentando.optimizers.replica_optimizer import ReplicaOptimizer
from lentando.optimizers.rules.adacomm import AdaptivePeriod
from lentando.optimizers.rules.adasum import AdasumDeltas
from lentando.optimizers.rules.all_reduce import AllReduce
from lentando.optimizers.rules.base_algorithm import BaseAlgorithm, BoundAlgorithm
from lentando.optimizers.rules.co2_momentum import CO2Momentum
from lentando.optimizers.rules.gossip import DPSGD, OSGP, SGP
from lentando.optimizers.rules.local_sgd import LocalSGD
from lentando.optimizers.rules.movement_penalty import MovementPenalty, Weighting
from lentando.optimizers.rules.non_finite import OnNonFinite
from lentando.optimizers.rules.outer_rule import OuterRule
from lentando.optimizers.rules.outer_sgd import OuterSGD
from lentando.optimizers.rules.outer_stepping import OuterAlgorithm, OuterOptions, OuterStepping
from lentando.optimizers.rules.period import Decision, FixedPeriod, Period, PeriodSetting, PostLocal, RoundSummary
from lentando.optimizers.rules.settings import BaseBuffers, Settings
from lentando.optimizers.rules.slow_momentum import SlowMomentum
from lentando.optimizers.rules.unequal_period import RoundSeconds, StepsByRank
from lentando.optimizers.rules.wire import WireDtype

__all__ = [
    "DPSGD",
    "OSGP",
    "SGP",
    "AdaptivePeriod",
    "Adasum",
    "AdasumDeltas",
    "Algorithm",
    "AllReduce",
    "Average",
    "BaseAlgorithm",
    "BaseBuffers",
    "BaseState",
    "BipartiteExponential",
    "BoundAlgorithm",
    "CO2Momentum",
    "CheckpointError",
    "Circulant",
    "Complete",
    "ConfigurationError",
    "DeadlockError",
    "Decision",
    "FixedPeriod",
    "FromGraph",
    "FromMatrix",
    "GraphSequence",
    "HorovodInternalError",
    "HostsUpdatedInterrupt",
    "Hybrid",
    "Hypercube",
    "Joinable",
    "LaunchError",
    "LentandoError",
    "LocalSGD",
    "Max",
    "Min",
    "MismatchError",
    "MovementPenalty",
    "NodeAware",
    "NonFiniteError",
    "NotInitializedError",
    "OnNonFinite",
    "OnePeerExponential",
    "OnePeerHypercube",
    "Op",
    "OptimizerStateChoice",
    "OuterAlgorithm",
    "OuterOptions",
    "OuterRule",
    "OuterSGD",
    "OuterStepping",
    "PPeerExponential",
    "Peers",
    "Period",
    "PeriodSetting",
    "PostLocal",
    "ProcessSet",
    "Product",
    "RankLostError",
    "ReplicaOptimizer",
    "Ring",
    "RoundSeconds",
    "RoundSummary",
    "Settings",
    "SimulationError",
    "SlowMomentum",
    "StaticExponential",
    "StepsByRank",
    "Stochasticity",
    "StopHandle",
    "Sum",
    "Topology",
    "Torus",
    "TransportError",
    "UnsupportedOperationError",
    "WeightMap",
    "WeightRule",
    "Weighting",
    "WireDtype",
    "adacomm",
    "add_process_set",
    "barrier",
    "ccl_built",
    "check_graphs",
    "cross_rank",
    "cross_size",
    "cuda_built",
    "ddl_built",
    "diloco",
    "global_process_set",
    "gloo_built",
    "gloo_enabled",
    "init",
    "is_homogeneous",
    "is_initialized",
    "join",
    "load",
    "local_rank",
    "local_size",
    "mpi_built",
    "mpi_enabled",
    "mpi_threads_supported",
    "nccl_built",
    "rank",
    "remove_process_set",
    "rocm_built",
    "save",
    "save_on_signal",
    "second_modulus",
    "shutdown",
    "size",
    "slowmo",
    "start_timeline",
    "stochasticity",
    "stop_timeline",
]
