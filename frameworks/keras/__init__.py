"""Stand-in for ``horovod.keras``, on Keras 3 with TensorFlow: ``import lentando.keras as hvd``."""

from lentando.keras import callbacks, elastic
from lentando.tensorflow.keras import (
    Average,
    DistributedOptimizer,
    Sum,
    init,
    is_initialized,
    local_rank,
    local_size,
    rank,
    shutdown,
    size,
)

__all__ = [
    "Average",
    "DistributedOptimizer",
    "Sum",
    "callbacks",
    "elastic",
    "init",
    "is_initialized",
    "local_rank",
    "local_size",
    "rank",
    "shutdown",
    "size",
]
