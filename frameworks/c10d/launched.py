"""The variables that ``init_process_group`` reads, filled in where mpirun or srun has started this process."""

import multiprocessing
import os
import socket

from lentando.c10d.addresses import common_address, own_interfaces
from lentando.c10d.job import opened_job
from lentando.comm.errors import LaunchError
from lentando.comm.inherited_variables import check_is_rank, mark_rank
from lentando.comm.launch import Launch, detect_launch
from lentando.comm.objects import allgather_object, broadcast_object

__all__ = ["set_variables"]

_reserved: list[socket.socket] = []
"""Keeps the port of this rank's store from being given to another program until the store listens on it."""


def set_variables() -> None:
    """Set ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``LOCAL_WORLD_SIZE``, ``MASTER_ADDR`` and ``MASTER_PORT``.

    A variable that is set already is left as it is. Does nothing in a process that no launcher of MPI has started, and
    in those that a rank has started. Collective over all ranks of the job.
    """
    launch = detect_launch()
    if launch is None or not launch.mpi or _was_started_by_rank(launch):
        return
    world = opened_job().transport
    by_rank = allgather_object(world, [*own_interfaces()])
    others = [by_rank[rank] for rank in range(world.size) if rank not in world.same_node]
    address, port = broadcast_object(world, _meeting_point(by_rank[0], others) if world.rank == 0 else None)
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
    mark_rank(os.environ)  # again: the mark is of these values


def _was_started_by_rank(launch: Launch) -> bool:
    """Whether this process has inherited its variables from a rank, and must not join the job."""
    if multiprocessing.parent_process() is not None:
        return True
    try:
        check_is_rank(os.environ, launch)
    except LaunchError:
        return True
    return False


def _meeting_point(interfaces: list[str], others: list[list[str]]) -> list[str | int]:
    """An address of this rank at which the store of torch.distributed is reached, and a port that is free."""
    reserved = socket.socket(socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET)
    reserved.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    reserved.bind(("", 0))  # not listening: the store binds to the same port, and no other program is given it
    _reserved.append(reserved)
    address = (common_address(interfaces, others) or socket.gethostname()) if others else "127.0.0.1"
    return [address, reserved.getsockname()[1]]
