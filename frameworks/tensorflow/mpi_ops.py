"""Operations under the name of Horovod's module ``horovod.tensorflow.mpi_ops``, from which programs import them."""

from lentando.optimizers.exports import *
from lentando.tensorflow.functions import *
