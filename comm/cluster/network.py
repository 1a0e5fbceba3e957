"""The network model: when a message that is sent now has left, and when it is there.

Every wire is first come, first served. A message of B bytes sent at time t over wires of bandwidth b_1, b_2, ...
starts at s = max(t, when the last of these wires is free), has left at s + B / min(b), and is there one latency later
(alpha-beta model; Hockney 1994). So n messages of equal size that enter a shared wire together have all arrived after
n B / b plus a latency, as if each had had b / n.
"""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from math import inf
from random import Random

from lentando.comm.errors import ConfigurationError

__all__ = ["Link", "Network", "SharedLink", "Wires"]


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


@dataclass(slots=True)
class _Wire:
    """Something that carries one message at a time."""

    bandwidth_bytes_per_second: float
    free_at_seconds: float = 0.0


@dataclass(slots=True)
class _Path:
    """What a message from one rank to another goes through."""

    wires: tuple[_Wire, ...]
    slowest_bytes_per_second: float
    latency_seconds: float
    jitter_seconds: float


class Wires:
    """The network of a running simulation.

    Args:
        network: the model.
        size: number of ranks.
        local_size: ranks per node.
        seed: of the jitter; each sender has its own stream, so one rank's messages do not change another's jitter.
    """

    def __init__(self, network: Network, size: int, local_size: int, seed: int) -> None:
        for sender, receiver in network.links:
            if not (0 <= sender < size and 0 <= receiver < size):
                raise ConfigurationError(f"link ({sender}, {receiver}) of the network: expected ranks 0 to {size - 1}")
        self._network, self._local_size = network, local_size
        self._out_ports = [_Wire(network.bandwidth_bytes_per_second) for _ in range(size)]
        self._in_ports = [_Wire(network.bandwidth_bytes_per_second) for _ in range(size)]
        self._shared = [(_Wire(shared.bandwidth_bytes_per_second), shared.links) for shared in network.shared]
        self._random = [Random(f"jitter {seed} {rank}") for rank in range(size)]
        self._paths: dict[tuple[int, int], _Path] = {}
        own = [*network.links.values(), *([] if network.within_node is None else [network.within_node])]
        self._alpha_seconds = max([network.latency_seconds, *(link.latency_seconds for link in own)])
        self._beta_seconds_per_byte = 1 / min(
            network.bandwidth_bytes_per_second,
            *(link.bandwidth_bytes_per_second for link in own),
            *(shared.bandwidth_bytes_per_second for shared in network.shared),
            inf,
        )
        self._size = size

    def send(self, now: float, sender: int, receiver: int, size_bytes: int) -> tuple[float, float]:
        """Put a message on its way. Calls must be in order of ``now``.

        Returns:
            when it has left the sender, and when it is there, in seconds.
        """
        path = self._paths.get((sender, receiver))
        if path is None:
            path = self._paths[sender, receiver] = self._path(sender, receiver)
        start = now
        for wire in path.wires:
            if wire.free_at_seconds > start:
                start = wire.free_at_seconds
        for wire in path.wires:
            wire.free_at_seconds = start + size_bytes / wire.bandwidth_bytes_per_second
        left = start + size_bytes / path.slowest_bytes_per_second
        arrival = left + path.latency_seconds
        if path.jitter_seconds:
            arrival += path.jitter_seconds * self._random[sender].random()
        return left, arrival

    def collective_seconds(self, operation: str, size_bytes: int) -> float:
        """What an engine collective takes from when the last rank has come; see ``Network``."""
        size = self._size
        rounds = (size - 1).bit_length()
        latency, moved = {
            "allreduce": (2 * rounds, 2 * (size - 1) / size * size_bytes),
            "broadcast": (rounds, size_bytes if size > 1 else 0),
            "allgather": (rounds, (size - 1) * size_bytes),
            "barrier": (rounds, 0),
        }[operation]
        return latency * self._alpha_seconds + moved * self._beta_seconds_per_byte

    def _path(self, sender: int, receiver: int) -> _Path:
        network = self._network
        link = network.links.get((sender, receiver))
        if link is None and sender // self._local_size == receiver // self._local_size:
            link = network.within_node
        if link is None:
            wires = [self._out_ports[sender], self._in_ports[receiver]]
            latency_seconds, jitter_seconds = network.latency_seconds, network.jitter_seconds
        else:
            wires = [_Wire(link.bandwidth_bytes_per_second)]
            latency_seconds, jitter_seconds = link.latency_seconds, link.jitter_seconds
        wires += [wire for wire, links in self._shared if links is None or (sender, receiver) in links]
        slowest = min(wire.bandwidth_bytes_per_second for wire in wires)
        return _Path(tuple(wires), slowest, latency_seconds, jitter_seconds)
