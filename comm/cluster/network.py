"""The network model: latency and bandwidth of the links between ranks (alpha-beta model; Hockney 1994)."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf

from lentando.comm.errors import ConfigurationError

__all__ = ["Link", "Network", "SharedLink"]


@dataclass(frozen=True)
class Link:
    """A link from one rank to another, in one direction.

    Args:
        latency_seconds: time between the departure and the arrival of a message, >= 0.
        bandwidth_bytes_per_second: bandwidth, > 0; ``math.inf`` for a link that takes no time per byte.
        jitter_seconds: upper limit of a uniformly distributed additional latency of each message.
    """

    latency_seconds: float
    bandwidth_bytes_per_second: float
    jitter_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check(self.latency_seconds, self.bandwidth_bytes_per_second, self.jitter_seconds)


@dataclass(frozen=True)
class SharedLink:
    """A link that several pairs of ranks share, in addition to their own links: an uplink, a bus, an ocean cable.

    Args:
        bandwidth_bytes_per_second: total bandwidth of all messages on the shared link.
        links: (sender, receiver) pairs whose messages cross the shared link; all pairs if None.
    """

    bandwidth_bytes_per_second: float
    links: Collection[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        _check(0.0, self.bandwidth_bytes_per_second, 0.0)


@dataclass(frozen=True)
class Network:
    """A network of ranks. The default is a 10 Gbit/s Ethernet.

    Each rank has one full-duplex port, whose bandwidth is shared by the messages that it sends at a time, and by those
    that it receives. Links given by ``links`` and ``within_node`` bypass the ports.

    Collectives of the backend end on all ranks at the same time. They take, from the moment at which the last rank has
    joined, with the latency alpha and the time per byte beta of the slowest link:

    - all-reduce: 2 ceil(log2 n) alpha + 2 (n - 1) / n B beta (Thakur, Rabenseifner and Gropp, IJHPCA 2005);
    - all-gather: ceil(log2 n) alpha + (n - 1) B beta (same paper);
    - broadcast: ceil(log2 n) alpha + B beta, a pipelined tree;
    - barrier: ceil(log2 n) alpha.

    Args:
        latency_seconds: latency of every link, >= 0.
        bandwidth_bytes_per_second: bandwidth of every rank's port, > 0.
        jitter_seconds: upper limit of a uniformly distributed additional latency of each message.
        links: links that differ, by (sender, receiver).
        within_node: link between any two ranks of the same node, if it differs.
        shared: links that several pairs of ranks share.
        reordering: whether a message may overtake an earlier one of the same sender, receiver and tag, because of
            jitter. Otherwise it is held back until the earlier one has arrived, as MPI requires.
        buffered: whether a send is complete when the message has left. Otherwise it is complete when the message has
            been received, as with MPI_Ssend: a program that relies on buffering then deadlocks.

    Raises:
        ConfigurationError: for values outside these ranges.

    Example:
        >>> import numpy as np
        >>> from lentando.comm.cluster import Network
        >>> from lentando.comm.simulation import simulate
        >>> network = Network(latency_seconds=1e-3, bandwidth_bytes_per_second=1e6)
        >>> def send_a_megabyte(transport):
        ...     array = np.zeros(1_000_000, np.uint8)
        ...     peer = 1 - transport.rank
        ...     transport.exchange([(peer, array)], [(peer, array.copy())]).wait()
        ...     return round(transport.clock(), 3)
        >>> simulate(send_a_megabyte, 2, network=network)
        [1.001, 1.001]
    """

    latency_seconds: float = 50e-6
    bandwidth_bytes_per_second: float = 1.25e9
    jitter_seconds: float = 0.0
    links: Mapping[tuple[int, int], Link] = field(default_factory=dict, kw_only=True)
    within_node: Link | None = field(default=None, kw_only=True)
    shared: Collection[SharedLink] = field(default=(), kw_only=True)
    reordering: bool = field(default=False, kw_only=True)
    buffered: bool = field(default=True, kw_only=True)

    def __post_init__(self) -> None:
        _check(self.latency_seconds, self.bandwidth_bytes_per_second, self.jitter_seconds)


def _check(latency_seconds: float, bandwidth_bytes_per_second: float, jitter_seconds: float) -> None:
    if not 0 <= latency_seconds < inf:
        raise ConfigurationError(f"latency_seconds must be finite and >= 0, got {latency_seconds}")
    if not bandwidth_bytes_per_second > 0:
        raise ConfigurationError(f"bandwidth_bytes_per_second must be > 0, got {bandwidth_bytes_per_second}")
    if not 0 <= jitter_seconds < inf:
        raise ConfigurationError(f"jitter_seconds must be finite and >= 0, got {jitter_seconds}")
