"""``horovod.tensorflow.elastic`` is ``lentando.tensorflow.elastic``."""

from horovod import _forward

__getattr__ = _forward.attribute_or_refusal(_forward.module("lentando.tensorflow.elastic", "lentando.tensorflow"))
