"""The network of a running simulation: when a message that is sent now has left, and when it arrives.

Each wire serves its messages in the order in which they are sent. A message of B bytes sent at time t over wires of
bandwidth b_1, b_2, ... starts at s = max(t, time at which the last of these wires is free), has left at s + B / min(b),
and arrives one latency later (alpha-beta model; Hockney 1994). So n messages of equal size that enter a shared wire at
the same time have all arrived after n B / b plus a latency, as if each had had a bandwidth of b / n.
"""

from dataclasses import dataclass
from math import inf
from random import Random

from lentando.comm.cluster import Network
from lentando.comm.errors import ConfigurationError

__all__ = ["Wires"]


@dataclass(slots=True)
class _Wire:
    """A resource that carries one message at a time."""

    bandwidth_bytes_per_second: float
    free_at_seconds: float = 0.0


@dataclass(slots=True)
class _Path:
    """The wires that carry a message from one rank to another."""

    wires: tuple[_Wire, ...]
    slowest_bytes_per_second: float
    latency_seconds: float
    jitter_seconds: float


class Wires:
    """The network of a running simulation.

    Args:
        network: network model.
        size: number of ranks.
        local_size: number of ranks per node.
        seed: seed of the jitter. Each sender has its own stream, so one rank's messages do not change another's jitter.
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
        special = [*network.links.values(), *([] if network.within_node is None else [network.within_node])]
        self._alpha_seconds = max([network.latency_seconds, *(link.latency_seconds for link in special)])
        self._beta_seconds_per_byte = 1 / min(
            network.bandwidth_bytes_per_second,
            *(link.bandwidth_bytes_per_second for link in special),
            *(shared.bandwidth_bytes_per_second for shared in network.shared),
            inf,
        )
        self._size = size

    def send(self, now: float, sender: int, receiver: int, size_bytes: int) -> tuple[float, float]:
        """Send a message at time ``now``. Calls must be in the order of ``now``.

        Returns:
            virtual times at which the message has left the sender and arrives, in seconds.
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

    def collective_seconds(self, operation: str, size_bytes: int, size: int | None = None) -> float:
        """Return how long a collective takes after the last rank has joined it, by the formulas of ``Network``.

        Args:
            operation: name of the collective.
            size_bytes: size of the array of one rank.
            size: number of participating ranks; all by default.
        """
        size = self._size if size is None else size
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
