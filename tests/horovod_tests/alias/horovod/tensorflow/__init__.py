"""``horovod.tensorflow`` is ``lentando.tensorflow``."""

import lentando.tensorflow
from horovod._forward import attribute_of
from horovod.tensorflow import util as util
from horovod.tensorflow.util import _executing_eagerly as _executing_eagerly

__getattr__ = attribute_of(lentando.tensorflow)
