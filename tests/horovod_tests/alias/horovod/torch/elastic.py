"""``horovod.torch.elastic`` is ``lentando.torch.elastic``."""

from horovod import _forward

__getattr__ = _forward.attribute_or_refusal(_forward.module("lentando.torch.elastic", "lentando.torch"))
