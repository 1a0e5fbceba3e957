"""``horovod.keras`` is ``lentando.keras``."""

from horovod import _forward

__getattr__ = _forward.attribute_of(_forward.module("lentando.keras", "lentando.tensorflow"))
