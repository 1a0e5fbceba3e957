"""``horovod.tensorflow.functions``: its names are those of ``lentando.tensorflow``."""

import lentando.tensorflow
from horovod._forward import attribute_or_refusal

__getattr__ = attribute_or_refusal(lentando.tensorflow)
