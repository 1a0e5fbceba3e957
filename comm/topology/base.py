"""The seam: a topology (described without a world size) and its plan for one (a sequence of weighted digraphs)."""

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
    """The weighted digraphs that follow each other, step by step, among ``size`` ranks.

    After the first ``lead_steps`` the sequence repeats every ``period_steps``. The mixing matrix P of a step has, in
    row i and column j, the share of j's message that i receives; its columns sum to 1. One gossip step is x <- P x, w
    <- P w, and z = x / w approaches the mean (push-sum; Kempe, Dobra and Gehrke, FOCS 2003; Assran et al., arXiv
    1811.10792).

    To write one: call ``super().__init__`` and answer ``peers_in``. ``check_graphs`` tells whether it holds together.

    Args:
        size: number of ranks.
        period_steps: steps after which the sequence repeats, >= 1.
        lead_steps: steps before that holds.
        name: what it is called in messages and pictures.
    """

    def __init__(self, size: int, period_steps: int, *, lead_steps: int = 0, name: str = "") -> None:
        self.size = size
        self.period_steps = period_steps
        self.lead_steps = lead_steps
        self.name = name or type(self).__name__

    @abstractmethod
    def peers_in(self, rank: int, phase: int) -> Peers:
        """``rank``'s part in graph number ``phase``."""

    @property
    def phases(self) -> int:
        """Number of different graphs: what is planned per graph is planned so many times."""
        return self.lead_steps + self.period_steps

    def phase(self, step: int) -> int:
        """Number of the graph in force at ``step`` >= 0, ``0 <= phase < phases``."""
        if step < self.lead_steps:
            return step
        return self.lead_steps + (step - self.lead_steps) % self.period_steps

    @final
    def peers(self, rank: int, step: int) -> Peers:
        """Whom ``rank`` sends to and hears from at ``step`` >= 0."""
        return self.peers_in(rank, self.phase(step))

    def mixing_matrix(self, step: int = 0) -> NDArray[np.float64]:
        """P of ``step``, shape ``(size, size)``: ``P[i, j]`` is the share of j's message that i receives."""
        return self._matrix(self.phase(step))

    def mixing_product(self, steps: int, start: int = 0) -> NDArray[np.float64]:
        """P of ``start + steps - 1`` times ... times P of ``start``: what ``steps`` steps do together."""
        product = np.eye(self.size)
        for step in range(start, start + steps):
            product = self.mixing_matrix(step) @ product
        return product

    @cached_property
    def stochasticity(self) -> Literal["doubly", "column"]:
        """``"doubly"`` if the rows of every matrix sum to 1 too: then w stays 1, and D-PSGD works."""
        doubly = all(stochasticity(self._matrix(phase)) == "doubly" for phase in range(self.phases))
        return "doubly" if doubly else "column"

    @cached_property
    def spectral_gap(self) -> float:
        """1 - rho, where rho is the factor by which disagreement shrinks per step in the long run.

        rho = |lambda_2|^(1 / period_steps), with lambda_2 the second largest eigenvalue of the product of the
        matrices of one period. A gap of 1 means that a few periods average exactly; 0 that none ever will.
        """
        product = self.mixing_product(self.period_steps, self.lead_steps)
        rho: float = second_modulus(product) ** (1 / self.period_steps)
        return 1 - rho

    def draw(self, path: str | Path | None = None) -> "Figure":
        """A picture: ranks on a circle, one panel per graph. Needs matplotlib; saved to ``path`` if given."""
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
    """Who gossips with whom, for a world of any size.

    To write one: answer ``plan``, and be hashable (a frozen dataclass is), since plans are kept.
    """

    @abstractmethod
    def plan(self, size: int) -> GraphSequence:
        """The plan for ``size`` >= 1 ranks. Raises ``ConfigurationError`` for a size that cannot be."""

    @final
    def for_size(self, size: int) -> GraphSequence:
        """The plan for a world of ``size`` ranks. Nothing is sent: every rank plans alike.

        Raises:
            ConfigurationError: if this topology cannot be had among so many ranks; says why.
        """
        if size < 1:
            raise ConfigurationError(f"a topology needs at least 1 rank, got {size}")
        return _planned(self, size)


@lru_cache(maxsize=64)
def _planned(topology: Topology, size: int) -> GraphSequence:
    return topology.plan(size)
