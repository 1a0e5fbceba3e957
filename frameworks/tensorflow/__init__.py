"""Lentando for TensorFlow and Keras 3: ``import lentando.tensorflow as lt``."""

from typing import TYPE_CHECKING

from lentando.optimizers import exports as _exports
from lentando.optimizers.exports import *
from lentando.tensorflow import callbacks as _callbacks
from lentando.tensorflow import elastic as elastic
from lentando.tensorflow import functions as _functions
from lentando.tensorflow import mpi_ops as mpi_ops
from lentando.tensorflow.callbacks import *
from lentando.tensorflow.functions import *
from lentando.tensorflow.methods import *
from lentando.tensorflow.model_layers import *
from lentando.tensorflow.optimizer import *
from lentando.tensorflow.original_errors import original_errors as original_errors

if not TYPE_CHECKING:  # type checkers take the names from the imports: they understand only lists that are written out
    __all__ = [
        *_exports.__all__,
        *_callbacks.__all__,
        *_functions.__all__,
        "AdaComm",
        "DiLoCo",
        "DistributedOptimizer",
        "SlowMo",
        "elastic",
        "layers",
        "original_errors",
    ]
