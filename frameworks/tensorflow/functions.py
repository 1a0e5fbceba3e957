"""Horovod's functions for TensorFlow, under Horovod's names: in eager code, in a ``tf.function``, and in a session."""

from lentando.tensorflow.compression import Compression, Compressor
from lentando.tensorflow.exchanges import allgather, alltoall, broadcast, grouped_allgather
from lentando.tensorflow.gradient_tape import DistributedGradientTape, PartialDistributedGradientTape
from lentando.tensorflow.number_functions import (
    local_rank_op,
    local_size_op,
    process_set_included_op,
    rank_op,
    size_op,
)
from lentando.tensorflow.object_functions import allgather_object, broadcast_object, broadcast_object_fn
from lentando.tensorflow.reductions import allreduce, grouped_allreduce
from lentando.tensorflow.scattering import grouped_reducescatter, reducescatter
from lentando.tensorflow.sync_batch_norm import SyncBatchNormalization
from lentando.tensorflow.variables import (
    BroadcastGlobalVariablesHook,
    broadcast_,
    broadcast_global_variables,
    broadcast_variables,
)

__all__ = [
    "BroadcastGlobalVariablesHook",
    "Compression",
    "Compressor",
    "DistributedGradientTape",
    "PartialDistributedGradientTape",
    "SyncBatchNormalization",
    "allgather",
    "allgather_object",
    "allreduce",
    "alltoall",
    "broadcast",
    "broadcast_",
    "broadcast_global_variables",
    "broadcast_object",
    "broadcast_object_fn",
    "broadcast_variables",
    "grouped_allgather",
    "grouped_allreduce",
    "grouped_reducescatter",
    "local_rank_op",
    "local_size_op",
    "process_set_included_op",
    "rank_op",
    "reducescatter",
    "size_op",
]
