"""Lentando for TensorFlow and Keras 3: ``import lentando.tensorflow as lt``."""

from typing import TYPE_CHECKING

import tensorflow as _tf  # noqa: ICN001 - no name of this package

from lentando.comm.process_state import ProcessState as _ProcessState
from lentando.comm.process_state import register_process_state as _register_process_state
from lentando.optimizers import exports as _exports
from lentando.optimizers.exports import *
from lentando.tensorflow import callbacks as _callbacks
from lentando.tensorflow import functions as _functions
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
        "layers",
        "original_errors",
    ]

# In a simulation, ranks share a process. Each has its own global generator of TensorFlow, which its program seeds.
# Keras draws its seeds from Python's generator, of which each simulated rank has its own, too.
_register_process_state(
    "tensorflow",
    _ProcessState(
        _tf.random.get_global_generator,
        _tf.random.set_global_generator,
        lambda seed, rank: _tf.random.set_global_generator(_tf.random.Generator.from_seed([seed, rank])),
    ),
)
