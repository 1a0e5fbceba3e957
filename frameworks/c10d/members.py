"""How the members of a group find each other: they exchange their MPI ranks through the store of torch.distributed.

The numbers that torch.distributed gives to ranks need not be those of MPI. Only the members of a group take part.
"""

import atexit
import json
import secrets
import zlib
from collections import Counter
from datetime import timedelta
from typing import TYPE_CHECKING, cast

import numpy as np
from torch._C._distributed_c10d import Store
from torch.distributed import DistBackendError

from lentando.comm.capabilities import Background
from lentando.comm.errors import ranks_in_words
from lentando.comm.launch import detect_launch
from lentando.comm.startup_timeout import startup_timeout
from lentando.comm.transport import Transport
from lentando.comm.transport_selection import open_transport
from lentando.comm.transports.single import SingleTransport

if TYPE_CHECKING:
    from lentando.comm.transports.mpi import MPITransport

__all__ = ["World", "for_thread", "open_members", "open_world"]

TAGS = 32_768
"""Number of tags that every MPI offers."""


class World:
    """All ranks of this MPI job, of which groups are made.

    Args:
        transport: transport of the job.

    Attributes:
        transport: the same.
        job: text that is equal on all ranks of this job, and on no other.
    """

    def __init__(self, transport: "MPITransport") -> None:
        self.transport = transport
        token = np.frombuffer(secrets.token_bytes(16), np.uint8).copy()
        transport.broadcast(token)
        self.job = token.tobytes().hex()


_worlds: list[World] = []
_created: Counter[str] = Counter()
"""Number of groups of each name that this process has created: keys in a store that outlives a group must differ."""


def open_world() -> World:
    """All ranks of the job that mpirun or srun has started. Collective at the first call.

    Raises:
        RuntimeError: if no launcher has started MPI ranks.
        LaunchError: if the launcher belongs to another MPI than the library.
    """
    if not _worlds:
        launch = detect_launch()
        if launch is None or not launch.mpi:
            started = "no launcher" if launch is None else launch.launcher
            raise RuntimeError(
                f'backend "lentando" connects MPI processes, but {started} started this one. Start with mpirun or '
                'srun. With torchrun, use init_process_group("gloo"), or train with lentando.torch'
            )
        transport = open_transport()
        if transport.name != "mpi":
            raise RuntimeError(f'backend "lentando" needs MPI, but transport {transport.name!r} was chosen')
        _worlds.append(World(cast("MPITransport", transport)))
        atexit.register(_worlds.clear)
    return _worlds[0]


def open_members(store: Store, rank: int, size: int, name: str, timeout: timedelta) -> Transport:
    """The transport of a group, in which ranks have the group's numbers. Collective over its members.

    Args:
        store: store that the members share, for this group only.
        rank: number of this process in the group.
        size: number of members.
        name: name of the group.
        timeout: the longest time to wait for the other members.

    Raises:
        DistBackendError: if some of the members do not arrive in time, or are not ranks of one MPI job.
    """
    if size == 1:
        return SingleTransport()
    world = open_world()
    _created[name] += 1
    keys = [f"lentando/{_created[name]}/{member}" for member in range(size)]
    store.set(keys[rank], json.dumps([world.job, world.transport.rank]))
    try:
        store.wait(keys, timeout)
    except RuntimeError as error:
        missing = ranks_in_words([member for member, key in enumerate(keys) if not store.check([key])])
        raise DistBackendError(
            f"rank {rank} of {size} has waited {timeout.total_seconds():g} s for {missing} of group {name!r}, which "
            "has not created this group"
        ) from error
    found = [tuple(json.loads(store.get(key))) for key in keys]
    if any(job != world.job for job, _ in found) or len(set(found)) < size:
        places = ", ".join(
            f"rank {member} is MPI rank {number} of job {job[:8]}" for member, (job, number) in enumerate(found)
        )
        raise DistBackendError(
            f"the {size} ranks of group {name!r} are not different ranks of one MPI job: {places}. Start all of them "
            "with one mpirun or srun, and leave RANK and WORLD_SIZE to it"
        )
    tag = zlib.crc32(keys[0].encode() + name.encode()) % TAGS
    with startup_timeout(rank, size):
        return world.transport.for_members([number for _, number in found], tag)


def for_thread(transport: Transport) -> Transport:
    """A transport of the same ranks for the thread that executes collective operations. Collective.

    Raises:
        RuntimeError: if MPI admits one thread only.
    """
    if isinstance(transport, SingleTransport):
        return transport
    other = cast(Background, transport).for_thread()
    if other is None:
        raise RuntimeError(
            'backend "lentando" needs an MPI that admits several threads (MPI_THREAD_MULTIPLE): import lentando.c10d '
            "before mpi4py.MPI, or initialise MPI with that level"
        )
    return other
