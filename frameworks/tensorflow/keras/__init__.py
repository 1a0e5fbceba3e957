"""Stand-in for ``horovod.tensorflow.keras``, on Keras 3: ``import lentando.tensorflow.keras as hvd``."""

from lentando.optimizers.exports import Average, Sum, init, is_initialized, local_rank, local_size, rank, shutdown, size
from lentando.tensorflow.keras import callbacks, elastic
from lentando.tensorflow.optimizer import DistributedOptimizer

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
