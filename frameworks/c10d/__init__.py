"""Backend ``lentando`` of torch.distributed: its collectives over MPI from pip, with the all-reduce of Lentando.

Importing this registers the backend, and fills in what ``init_process_group`` reads where mpirun or srun has started
this process. A script for ``DistributedDataParallel`` needs one more line, and another backend::

    import lentando.c10d
    torch.distributed.init_process_group("lentando")
"""

from lentando.c10d.launched import set_variables
from lentando.c10d.process_group import LentandoProcessGroup
from lentando.c10d.registration import register

__all__ = ["LentandoProcessGroup"]

register()
set_variables()
