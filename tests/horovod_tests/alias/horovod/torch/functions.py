"""``horovod.torch.functions``: its names are those of ``lentando.torch``."""

import lentando.torch
from horovod._forward import attribute_or_refusal

__getattr__ = attribute_or_refusal(lentando.torch)
