"""How the members of a group find each other: they exchange their MPI ranks through the store of torch.distributed.

The numbers that torch.distributed gives to ranks need not be those of MPI. Only the members of a group take part.
"""

import json
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, cast

from torch._C._distributed_c10d import PrefixStore, Store
from torch.distributed import DistBackendError

from lentando.c10d.endings import Endings
from lentando.c10d.job import opened_job
from lentando.comm.errors import ranks_in_words
from lentando.comm.startup_timeout import startup_timeout
from lentando.comm.transport import Transport
from lentando.comm.transports.single import SingleTransport
from lentando.comm.transports.torch_distributed.meeting import RanksMissingError, agree_on_name

if TYPE_CHECKING:
    from lentando.comm.transports.mpi import MPITransport

__all__ = ["Members", "open_members"]

TAGS = 32_768
"""Number of tags that every MPI offers."""


@dataclass(frozen=True)
class Members:
    """What connects the members of a group, whose ranks have the numbers of the group.

    Attributes:
        store: store that they share.
        messages: transport for messages between two of them.
        collectives: transport for collective operations, used by one thread at a time.
        endings: notes about members that have left.
    """

    store: Store
    messages: Transport
    collectives: Transport
    endings: Endings

    @property
    def progress(self) -> Callable[[], object] | None:
        """Lets messages of ``collectives`` continue; None within a node, where none is left behind."""
        if self.collectives.local_size == self.collectives.size:
            return None
        transport = cast("MPITransport", self.collectives)
        return lambda: transport.next_message(0, None)  # every call of MPI does

    def close(self) -> None:
        """Release the transports. Messages in flight still arrive."""
        self.messages.close()  # and those that were opened from it


def open_members(store: Store, rank: int, size: int, name: str, timeout: timedelta) -> Members:
    """Connect the members of a group. Collective over them.

    Args:
        store: store that the members share, for this group only.
        rank: number of this process in the group.
        size: number of members.
        name: name of the group.
        timeout: the longest time to wait for the other members.

    Raises:
        DistBackendError: if some of the members do not arrive in time, or are not ranks of one MPI job.
        RuntimeError: if no launcher has started MPI ranks, or MPI admits one thread only.
    """
    if size == 1:
        return Members(store, SingleTransport(), SingleTransport(), Endings(store, "", rank, size))
    job = opened_job()
    until = time.monotonic() + timeout.total_seconds()
    try:
        # The store may hold keys of earlier groups of this name, which not the same ranks need have created.
        prefix = f"lentando/{agree_on_name(PrefixStore('lentando', store), rank, size, timeout)}"
        found = _exchanged(store, prefix, rank, size, until)
    except RanksMissingError as error:
        raise DistBackendError(
            f"rank {rank} of {size} has waited {timeout.total_seconds():g} s for {ranks_in_words(error.ranks)} of "
            f"group {name!r}, which has not created this group"
        ) from error
    if any(token != job.token for token, _ in found) or len(set(found)) < size:
        places = ", ".join(f"rank {each} is MPI rank {at} of job {token[:8]}" for each, (token, at) in enumerate(found))
        raise DistBackendError(
            f"the {size} ranks of group {name!r} are not different ranks of one MPI job: {places}. Start all of them "
            "with one mpirun or srun, and leave RANK and WORLD_SIZE to it"
        )
    with startup_timeout(rank, size):
        messages = job.transport.for_members([at for _, at in found], zlib.crc32((name + prefix).encode()) % TAGS)
        collectives = messages.for_thread()
    if collectives is None:
        raise RuntimeError(
            'backend "lentando" needs an MPI that admits several threads (MPI_THREAD_MULTIPLE): import lentando.c10d '
            "before mpi4py.MPI, or initialise MPI with that level"
        )
    return Members(store, messages, collectives, Endings(store, prefix, rank, size))


def _exchanged(store: Store, prefix: str, rank: int, size: int, until: float) -> list[tuple[str, int]]:
    """The MPI job and MPI rank of each member. Raises as ``agree_on_name`` does."""
    job = opened_job()
    keys = [f"{prefix}/{member}" for member in range(size)]
    store.set(keys[rank], json.dumps([job.token, job.transport.rank]))
    try:
        store.wait(keys, timedelta(seconds=max(until - time.monotonic(), 0.001)))
    except RuntimeError as error:
        missing = [member for member, key in enumerate(keys) if not store.check([key])]
        raise RanksMissingError(missing) from error
    values = [json.loads(store.get(key)) for key in keys]
    return [(str(token), int(at)) for token, at in values]
