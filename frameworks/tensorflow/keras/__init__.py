"""Stand-in for ``horovod.tensorflow.keras``, on Keras 3: ``import lentando.tensorflow.keras as hvd``."""

from typing import TYPE_CHECKING

from lentando.tensorflow.keras import callbacks as callbacks
from lentando.tensorflow.keras import elastic as elastic
from lentando.tensorflow.keras import exports as _exports
from lentando.tensorflow.keras.exports import *

if not TYPE_CHECKING:  # type checkers take the names from the imports: they understand only lists that are written out
    __all__ = [*_exports.__all__, "callbacks", "elastic"]
