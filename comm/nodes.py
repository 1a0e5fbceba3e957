"""Where a rank is among the nodes of its job: Horovod's ``cross_rank``, ``cross_size`` and ``is_homogeneous``."""

from dataclasses import dataclass

import numpy as np

from lentando.comm.job import job_of
from lentando.comm.transport import Transport

__all__ = ["Nodes", "nodes_of", "note_nodes"]


@dataclass(frozen=True)
class Nodes:
    """This rank among the ranks with the same local rank, one on each node.

    Attributes:
        cross_rank: number of this rank among them.
        cross_size: how many they are.
        is_homogeneous: whether every node has the same number of ranks.
    """

    cross_rank: int = 0
    cross_size: int = 1
    is_homogeneous: bool = True


def note_nodes(transport: Transport) -> None:
    """Exchange where the ranks are, so that ``nodes_of`` need not communicate. Collective if there are several nodes.

    Args:
        transport: transport that connects all ranks of the job.
    """
    if transport.local_size == transport.size:
        return
    places = transport.allgather(np.array([transport.local_rank, transport.local_size], np.int64))
    same = np.flatnonzero(places[:, 0] == transport.local_rank)
    is_homogeneous = bool((places[:, 1] == transport.local_size).all())
    job_of(transport).put(Nodes(int((same < transport.rank).sum()), len(same), is_homogeneous))


def nodes_of(transport: Transport) -> Nodes:
    """Return where this rank is; a single node if nothing else has been noted."""
    return job_of(transport).find(Nodes) or Nodes()
