"""Base classes: a topology, independent of the number of ranks, and its plan, a sequence of weighted digraphs."""

from abc import ABC, abstractmethod
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Literal, final

import numpy as np
from numpy.typing import NDArray

from lentando.comm.errors import ConfigurationError
from lentando.comm.topology.peers import Peers
from lentando.comm.topology.picture import draw
from lentando.comm.topology.spectrum import second_modulus, stochasticity

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["GraphSequence", "Topology"]


class GraphSequence(ABC):
    """A sequence of weighted digraphs among ``size`` ranks, one per step.

    After the first ``lead_steps`` steps, the sequence repeats every ``period_steps`` steps. The mixing matrix P of a
    step has, in row i and column j, the share of j's message that i receives. Its columns sum to 1. One gossip step is
    x <- P x, w <- P w, and z = x / w approaches the mean (push-sum; Kempe, Dobra and Gehrke, FOCS 2003; Assran et al.,
    arXiv 1811.10792).

    A subclass calls ``super().__init__`` and implements ``peers_in``. ``check_graphs`` checks it.

    Args:
        size: number of ranks.
        period_steps: number of steps after which the sequence repeats, >= 1.
        lead_steps: number of steps before the first period.
        name: name in messages and pictures; by default that of the class.

    Example:
        >>> from lentando.comm.topology import GraphSequence, Peers, check_graphs
        >>> class Pairs(GraphSequence):  # ranks 2k and 2k + 1 exchange halves, then ranks 2k + 1 and 2k + 2
        ...     def __init__(self, size):
        ...         super().__init__(size, period_steps=2)
        ...     def peers_in(self, rank, phase):
        ...         peer = (rank + (1 if rank % 2 == phase else -1)) % self.size
        ...         return Peers(((peer, 0.5),), ((peer, 0.5),), 0.5)
        >>> graphs = Pairs(4)
        >>> check_graphs(graphs)
        >>> graphs.mixing_product(2)
        array([[0.25, 0.25, 0.25, 0.25],
               [0.25, 0.25, 0.25, 0.25],
               [0.25, 0.25, 0.25, 0.25],
               [0.25, 0.25, 0.25, 0.25]])
    """

    def __init__(self, size: int, period_steps: int, *, lead_steps: int = 0, name: str = "") -> None:
        self.size = size
        self.period_steps = period_steps
        self.lead_steps = lead_steps
        self.name = name or type(self).__name__

    @abstractmethod
    def peers_in(self, rank: int, phase: int) -> Peers:
        """Return the neighbours and shares of ``rank`` in the graph with the number ``phase``."""

    @property
    def phases(self) -> int:
        """Number of different graphs."""
        return self.lead_steps + self.period_steps

    def phase(self, step: int) -> int:
        """Return the number of the graph of ``step`` >= 0, from 0 to ``phases`` - 1."""
        if step < self.lead_steps:
            return step
        return self.lead_steps + (step - self.lead_steps) % self.period_steps

    @final
    def peers(self, rank: int, step: int) -> Peers:
        """Return the neighbours and shares of ``rank`` at ``step`` >= 0."""
        return self.peers_in(rank, self.phase(step))

    def messages(self, step: int) -> list[tuple[int, int]]:
        """Return the sender and the receiver of each message of ``step`` >= 0."""
        return [(rank, receiver) for rank in range(self.size) for receiver, _ in self.peers(rank, step).out_neighbors]

    def mixing_matrix(self, step: int = 0) -> NDArray[np.float64]:
        """Return P of ``step``, shape ``(size, size)``: ``P[i, j]`` is the share of j's message that i receives."""
        return self._matrix(self.phase(step))

    def mixing_product(self, steps: int, start: int = 0) -> NDArray[np.float64]:
        """Return the product of the matrices of ``steps`` steps: P of ``start + steps - 1`` ... P of ``start``."""
        product = np.eye(self.size)
        for step in range(start, start + steps):
            product = self.mixing_matrix(step) @ product
        return product

    @cached_property
    def stochasticity(self) -> Literal["doubly", "column"]:
        """``"doubly"`` if the rows of every matrix sum to 1, too: then w stays 1, and D-PSGD is applicable."""
        doubly = all(stochasticity(self._matrix(phase)) == "doubly" for phase in range(self.phases))
        return "doubly" if doubly else "column"

    @cached_property
    def spectral_gap(self) -> float:
        """1 - rho, where rho is the asymptotic factor by which disagreement between ranks shrinks per step.

        ``rho = |lambda_2|^(1 / period_steps)``, with lambda_2 the second largest eigenvalue of the product of the
        matrices of one period. With a gap of 1, a few periods average exactly; with a gap of 0, no number of periods
        does.
        """
        product = self.mixing_product(self.period_steps, self.lead_steps)
        rho: float = second_modulus(product) ** (1 / self.period_steps)
        return 1 - rho

    def draw(self, path: str | Path | None = None) -> "Figure":
        """Draw the ranks on a circle, one panel per graph, and save the figure to ``path``, if given.

        Raises:
            ConfigurationError: if matplotlib is not installed.
        """
        return draw(self, path)

    def _matrix(self, phase: int) -> NDArray[np.float64]:
        matrix = np.zeros((self.size, self.size))
        for rank in range(self.size):
            peers = self.peers_in(rank, phase)
            matrix[rank, rank] = peers.self_weight
            for receiver, share in peers.out_neighbors:
                matrix[receiver, rank] = share
        return matrix

    def __str__(self) -> str:
        graphs = "1 graph" if self.phases == 1 else f"{self.phases} graphs"
        return (
            f"{self.name} among {self.size} ranks: {graphs}, {self.stochasticity} stochastic, "
            f"spectral gap {self.spectral_gap:.4g} per step"
        )


class Topology(ABC):
    """A description of which ranks gossip with each other, for any number of ranks.

    A subclass implements ``plan``, and is hashable (a frozen dataclass is), because plans are cached.

    Example:
        >>> from dataclasses import dataclass
        >>> from lentando.comm.testing import check_topology
        >>> from lentando.comm.topology import Circulant, Topology
        >>> @dataclass(frozen=True)
        ... class Neighbors(Topology):  # each rank sends to the next one
        ...     def plan(self, size):
        ...         return Circulant([[1] if size > 1 else []]).for_size(size)
        >>> check_topology(Neighbors())
    """

    @abstractmethod
    def plan(self, size: int) -> GraphSequence:
        """Return the plan for ``size`` >= 1 ranks, or raise a ``ConfigurationError`` if there is none for this size."""

    @final
    def for_size(self, size: int) -> GraphSequence:
        """Return the plan for ``size`` ranks. All ranks compute the same plan, without communication.

        Raises:
            ConfigurationError: if this topology does not exist for this number of ranks; states the reason.
        """
        if size < 1:
            raise ConfigurationError(f"a topology needs at least 1 rank, got {size}")
        return _planned(self, size)


@lru_cache(maxsize=64)
def _planned(topology: Topology, size: int) -> GraphSequence:
    return topology.plan(size)
