"""What every topology must pass before gossip can rely on it."""

from collections.abc import Iterable

import numpy as np

from lentando.comm.errors import ConfigurationError
from lentando.comm.topology import Topology, check_graphs

__all__ = ["check_topology"]


def check_topology(topology: Topology, sizes: Iterable[int] = (1, 2, 3, 4, 5, 8, 12)) -> None:
    """Check that ``topology`` keeps the promises that gossip relies on, for worlds of these sizes.

    Neighbours exist, are others, and come once; what one rank sends, the other expects; a rank's shares are positive
    and sum to 1; over a period, everybody hears of everybody; mixing matrices agree with what the ranks see.

    Raises:
        AssertionError: says which promise is broken, in which world.
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
