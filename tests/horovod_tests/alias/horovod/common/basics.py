"""``horovod.common.basics``: its names are those of ``lentando.optimizers``, which both frameworks export."""

import lentando.optimizers
from horovod._forward import attribute_or_refusal

__getattr__ = attribute_or_refusal(lentando.optimizers)
