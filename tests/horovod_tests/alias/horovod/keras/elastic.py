"""``horovod.keras.elastic`` is ``lentando.keras.elastic``."""

from horovod import _forward

__getattr__ = _forward.attribute_or_refusal(
    _forward.module("lentando.keras.elastic", "lentando.tensorflow.elastic", "lentando.tensorflow")
)
