"""``horovod.torch`` is ``lentando.torch``."""

import lentando.torch
from horovod._forward import attribute_of

__getattr__ = attribute_of(lentando.torch)
