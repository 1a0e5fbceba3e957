"""``horovod.tensorflow.keras`` is ``lentando.tensorflow.keras``."""

from horovod import _forward

__getattr__ = _forward.attribute_of(_forward.module("lentando.tensorflow.keras", "lentando.tensorflow"))
