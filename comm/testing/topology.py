"""``check_topology``: the conformance suite of topologies."""

from collections.abc import Iterable

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.topology import Topology, check_graphs

__all__ = ["check_topology"]


def check_topology(topology: Topology, sizes: Iterable[int] = (1, 2, 3, 4, 5, 8, 12)) -> None:
    """Check that a topology keeps the promises that gossip relies on.

    Neighbours are existing other ranks, each listed once. For each message that a rank sends, its receiver expects one.
    The shares of each rank are positive and sum to 1. Within a period, information from each rank reaches all ranks.
    Mixing matrices agree with the neighbours and shares.

    Args:
        topology: topology to check.
        sizes: numbers of ranks for which it is planned.

    Raises:
        AssertionError: if a promise is broken; names the promise and the number of ranks.

    Example:
        >>> from lentando.comm.testing import check_topology
        >>> from lentando.comm.topology import Circulant, Ring
        >>> check_topology(Ring())
        >>> check_topology(Circulant([[2]]), sizes=[4])
        Traceback (most recent call last):
            ...
        AssertionError: ... Circulant is disconnected: nothing of rank 0 ever reaches rank 1...
    """
    for size in sizes:
        try:
            graphs = topology.for_size(size)
            check_graphs(graphs)
        except ConfigurationError as error:
            raise AssertionError(f"{topology!r} among {size} ranks: {error}") from error
        for step in range(graphs.phases):
            total = graphs.mixing_matrix(step).sum(axis=0)
            assert np.allclose(total, 1), f"{topology!r} among {size} ranks: columns of step {step} sum to {total}"
