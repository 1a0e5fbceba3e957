"""Collectives under the name of Horovod's module ``horovod.torch.mpi_ops``, from which programs import them."""

from lentando.optimizers.exports import *
from lentando.torch.functions import *
