"""The variables that ``init_process_group`` reads, filled in where mpirun or srun has started this process."""

import os
import socket

from lentando.c10d.job import opened_job
from lentando.comm.launch import detect_launch
from lentando.comm.objects import broadcast_object

__all__ = ["set_variables"]

_reserved: list[socket.socket] = []
"""Keeps the port of this rank's store from being given to another program until the store listens on it."""


def set_variables() -> None:
    """Set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``.

    A variable that is set already is left as it is. Does nothing in a process that no launcher of MPI has started.
    Collective over all ranks of the job.
    """
    launch = detect_launch()
    if launch is None or not launch.mpi:
        return
    world = opened_job().transport
    address, port = broadcast_object(world, _own_address(world.local_size == world.size) if world.rank == 0 else None)
    values = {
        "RANK": world.rank,
        "WORLD_SIZE": world.size,
        "LOCAL_RANK": world.local_rank,
        "LOCAL_WORLD_SIZE": world.local_size,
        "MASTER_ADDR": address,
        "MASTER_PORT": port,
    }
    for name, value in values.items():
        os.environ.setdefault(name, str(value))


def _own_address(is_one_node: bool) -> list[str | int]:
    """An address of this rank for the store of torch.distributed, and a port that is free."""
    reserved = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))  # not listening: the store binds to the same port, and no other program is given it
    _reserved.append(reserved)
    return ["127.0.0.1" if is_one_node else socket.gethostname(), reserved.getsockname()[1]]
