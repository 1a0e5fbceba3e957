"""The network model: when a message that is sent now has left, and when it is there.

Every wire is first come, first served. A message of B bytes sent at time t over wires of bandwidth b_1, b_2, ...
starts at s = max(t, when the last of these wires is free), has left at s + B / min(b), and is there one latency later
(alpha-beta model; Hockney 1994). So n messages of equal size that enter a shared wire together have all arrived after
n B / b plus a latency, as if each had had b / n.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf

from lentando.comm.errors import ConfigurationError

__all__ = ["Link", "Network", "SharedLink"]


@dataclass(frozen=True)
class Link:
    """A wire from one rank to another, in one direction.

    Args:
        latency_seconds: time between leaving and being there, >= 0.
        bandwidth_bytes_per_second: > 0; ``math.inf`` for a wire that takes no time per byte.
        jitter_seconds: each message takes up to this much longer, uniformly.
    """

    latency_seconds: float
    bandwidth_bytes_per_second: float
    jitter_seconds: float = 0.0

    def __post_init__(self) -> None:
        _check(self.latency_seconds, self.bandwidth_bytes_per_second, self.jitter_seconds)


@dataclass(frozen=True)
class SharedLink:
    """A wire that several pairs of ranks share, besides their own: an uplink, a bus, an ocean cable.

    Args:
        bandwidth_bytes_per_second: of all messages on it together.
        links: (sender, receiver) pairs whose messages take it; all pairs if None.
    """

    bandwidth_bytes_per_second: float
    links: Collection[tuple[int, int]] | None = None

    def __post_init__(self) -> None:
        _check(0.0, self.bandwidth_bytes_per_second, 0.0)


@dataclass(frozen=True)
class Network:
    """How messages travel. The default is a 10 Gbit/s Ethernet.

    Each rank has one port, which sends at this bandwidth and receives at it, both at once: several messages at a time
    share it. Links given by ``links`` and ``within_node`` are wires of their own beside the port.

    Collectives of the engine take alpha-beta time from when the last rank has come, for all ranks alike, with alpha
    and beta of the slowest wire:

    - all-reduce: 2 ceil(log2 n) alpha + 2 (n - 1) / n B beta (Thakur, Rabenseifner and Gropp, IJHPCA 2005);
    - all-gather: ceil(log2 n) alpha + (n - 1) B beta (the same);
    - broadcast: ceil(log2 n) alpha + B beta, a tree whose levels work at the same time;
    - barrier: ceil(log2 n) alpha.

    Args:
        latency_seconds: of every link, >= 0.
        bandwidth_bytes_per_second: of every rank's port, > 0.
        jitter_seconds: each message takes up to this much longer, uniformly.
        links: by (sender, receiver), links that differ.
        within_node: the link between ranks of one node, if it differs.
        shared: wires shared by several links.
        reordering: whether a message may overtake an earlier one of the same sender, receiver and tag, as far as
            jitter lets it. Otherwise it is held back until that is there, as MPI's rule demands.
        buffered: whether a send is complete when the message has left. Otherwise only when its receive has taken it,
            as with MPI_Ssend: a program that relies on buffering then deadlocks.
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
