"""Lentando for PyTorch: ``import lentando.torch as lt``."""

from typing import TYPE_CHECKING

from lentando.optimizers import exports as _exports
from lentando.optimizers.exports import *
from lentando.torch import elastic as elastic
from lentando.torch import functions as _functions
from lentando.torch import mpi_ops as mpi_ops
from lentando.torch.compression import *
from lentando.torch.functions import *
from lentando.torch.methods import *
from lentando.torch.model_layers import *
from lentando.torch.optimizer import *
from lentando.torch.sync_batch_norm import *

if not TYPE_CHECKING:  # type checkers take the names from the imports: they understand only lists that are written out
    __all__ = [
        *_exports.__all__,
        *_functions.__all__,
        "AdaComm",
        "Compression",
        "Compressor",
        "DiLoCo",
        "DistributedOptimizer",
        "SlowMo",
        "SyncBatchNorm",
        "elastic",
        "layers",
    ]
