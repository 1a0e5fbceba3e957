"""Lentando for PyTorch: ``import lentando.torch as lt``."""

from typing import TYPE_CHECKING

import torch as _torch

from lentando.comm.process_state import ProcessState as _ProcessState
from lentando.comm.process_state import register_process_state as _register_process_state
from lentando.optimizers import exports as _exports
from lentando.optimizers.exports import *
from lentando.torch import functions as _functions
from lentando.torch.functions import *
from lentando.torch.layers import *
from lentando.torch.methods import *
from lentando.torch.optimizer import *

if not TYPE_CHECKING:  # type checkers take the names from the imports: they understand only lists that are written out
    __all__ = [*_exports.__all__, *_functions.__all__, "AdaComm", "DiLoCo", "DistributedOptimizer", "SlowMo", "layers"]

# In a simulation, ranks share a process. Each has its own state of the random generator, which its program seeds.
_register_process_state("torch", _ProcessState(_torch.get_rng_state, _torch.set_rng_state, lambda seed, rank: None))
