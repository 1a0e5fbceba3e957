"""Stand-in for ``horovod.keras``, on Keras 3 with TensorFlow: ``import lentando.keras as hvd``."""

from typing import TYPE_CHECKING

from lentando.keras import callbacks as callbacks
from lentando.keras import elastic as elastic
from lentando.tensorflow.keras import exports as _exports
from lentando.tensorflow.keras.exports import *

if not TYPE_CHECKING:  # type checkers take the names from the imports: they understand only lists that are written out
    __all__ = [*_exports.__all__, "callbacks", "elastic"]
