"""What one rank sends and receives in one step of gossip."""

from dataclasses import dataclass

__all__ = ["Peers"]


@dataclass(frozen=True, slots=True)
class Peers:
    """One rank's part in one step.

    The share of a message is chosen by its sender, who need not know how many others its receiver hears. A rank
    without neighbours rests: it keeps what it has.

    Attributes:
        out_neighbors: (rank, share) of those we send to: p_ji of our x and w goes to j.
        in_neighbors: (rank, share) of those who send to us: p_ij of j's x and w comes to us.
        self_weight: the share p_ii > 0 that we keep. With those of ``out_neighbors`` it sums to 1.
    """

    out_neighbors: tuple[tuple[int, float], ...]
    in_neighbors: tuple[tuple[int, float], ...]
    self_weight: float
