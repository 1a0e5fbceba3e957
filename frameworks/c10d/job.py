"""The MPI job that this process belongs to, of whose ranks groups are made."""

import os
import secrets
from typing import TYPE_CHECKING, cast

import numpy as np

from lentando.comm.inherited_variables import mark_rank
from lentando.comm.launch import detect_launch
from lentando.comm.transport_selection import open_transport

if TYPE_CHECKING:
    from lentando.comm.transports.mpi import MPITransport

__all__ = ["MPIJob", "opened_job"]


class MPIJob:
    """All ranks of an MPI job. Collective.

    Args:
        transport: transport of the job.

    Attributes:
        transport: the same.
        token: text that is equal on all ranks of this job, and on no other.
    """

    def __init__(self, transport: "MPITransport") -> None:
        self.transport = transport
        token = np.frombuffer(secrets.token_bytes(16), np.uint8).copy()
        transport.broadcast(token)
        self.token = token.tobytes().hex()


_opened: list[MPIJob] = []


def opened_job() -> MPIJob:
    """The job that mpirun or srun has started. Collective over all of its ranks at the first call.

    Raises:
        RuntimeError: if no launcher has started MPI ranks.
        LaunchError: if the launcher belongs to another MPI than the library.
    """
    if not _opened:
        launch = detect_launch()
        if launch is None or not launch.mpi:
            started = "no launcher" if launch is None else launch.launcher
            raise RuntimeError(
                f'backend "lentando" connects MPI processes, but {started} has started this one. Start with mpirun or '
                'srun. With torchrun, use init_process_group("gloo"), or train with lentando.torch'
            )
        transport = open_transport(prefer_mpi=True)
        if transport.name != "mpi":
            raise RuntimeError(f'backend "lentando" needs MPI, but transport {transport.name!r} was chosen')
        _opened.append(MPIJob(cast("MPITransport", transport)))
        mark_rank(os.environ)
    return _opened[0]
