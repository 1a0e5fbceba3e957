"""What one rank sends and receives in one step of gossip."""

from dataclasses import dataclass

__all__ = ["Peers"]


@dataclass(frozen=True, slots=True)
class Peers:
    """The neighbours of one rank in one step, and the shares that it sends and receives.

    The sender of a message chooses its share, without knowledge of the other messages of the receiver. A rank without
    neighbours keeps its parameters as they are.

    Attributes:
        out_neighbors: (rank j, share p_ji) of each receiver: rank i sends p_ji of its x and w to j.
        in_neighbors: (rank j, share p_ij) of each sender: rank i receives p_ij of the x and w of j.
        self_weight: share p_ii > 0 that the rank keeps. It and the shares of ``out_neighbors`` sum to 1.

    Example:
        >>> from lentando.comm.topology import Ring
        >>> peers = Ring().for_size(4).peers(rank=0, step=0)
        >>> [receiver for receiver, share in peers.out_neighbors]
        [1, 3]
        >>> round(peers.self_weight, 3)
        0.333
    """

    out_neighbors: tuple[tuple[int, float], ...]
    in_neighbors: tuple[tuple[int, float], ...]
    self_weight: float
