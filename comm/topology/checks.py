"""Checks of a sequence of graphs, for topologies of users and for tests."""

from collections import Counter
from collections.abc import Iterable

from lentando.comm.errors import ConfigurationError
from lentando.comm.topology.base import GraphSequence
from lentando.comm.topology.spectrum import SUM_TOLERANCE

__all__ = ["check_connected", "check_graphs"]


def check_graphs(graphs: GraphSequence) -> None:
    """Check every graph of the sequence for the properties that gossip relies on.

    Raises:
        ConfigurationError: if a neighbour does not exist, is the rank itself or is listed twice; if a share is not
            positive or a rank's shares do not sum to 1; if a rank sends what its receiver does not expect; or if the
            ranks are not connected. Names the graph and the rank.

    Example:
        >>> from lentando.comm.topology import GraphSequence, Peers, check_graphs
        >>> class Wrong(GraphSequence):  # no rank expects the message to the next rank
        ...     def peers_in(self, rank, phase):
        ...         return Peers((((rank + 1) % self.size, 0.5),), (), 0.5)
        >>> check_graphs(Wrong(3, period_steps=1))
        Traceback (most recent call last):
            ...
        lentando.comm.errors.ConfigurationError: Wrong, graph 0: rank 0 sends rank 1 a share of 0.5, which expects
        nothing
    """
    for step in range(graphs.lead_steps + graphs.period_steps):
        if not 0 <= graphs.phase(step) < graphs.phases:
            raise ConfigurationError(
                f"{graphs.name}, step {step}: there is no graph {graphs.phase(step)}, expected 0 to {graphs.phases - 1}"
            )
    for phase in range(graphs.phases):
        _check_graph(graphs, phase)
    check_connected(graphs)


def _check_graph(graphs: GraphSequence, phase: int) -> None:
    sent: dict[tuple[int, int], float] = {}
    expected: dict[tuple[int, int], float] = {}
    for rank in range(graphs.size):
        peers = graphs.peers_in(rank, phase)
        where = f"{graphs.name}, graph {phase}, rank {rank}"
        _check_neighbors(
            [receiver for receiver, _ in peers.out_neighbors], rank, graphs.size, f"{where}: out-neighbour"
        )
        _check_neighbors([sender for sender, _ in peers.in_neighbors], rank, graphs.size, f"{where}: in-neighbour")
        shares = [peers.self_weight, *(share for _, share in peers.out_neighbors)]
        if min(shares) <= 0 or abs(sum(shares) - 1) > SUM_TOLERANCE:
            raise ConfigurationError(f"{where}: shares must be positive and sum to 1, got {shares}")
        sent.update({(rank, receiver): share for receiver, share in peers.out_neighbors})
        expected.update({(sender, rank): share for sender, share in peers.in_neighbors})
    for sender, receiver in sorted(sent.keys() | expected.keys()):
        given, awaited = sent.get((sender, receiver)), expected.get((sender, receiver))
        if given != awaited:
            raise ConfigurationError(
                f"{graphs.name}, graph {phase}: rank {sender} sends rank {receiver} {_describe(given)}, "
                f"which expects {_describe(awaited)}"
            )


def _describe(share: float | None) -> str:
    return "nothing" if share is None else f"a share of {share:g}"


def _check_neighbors(neighbors: list[int], rank: int, size: int, label: str) -> None:
    for neighbor, times in Counter(neighbors).items():
        if not 0 <= neighbor < size:
            raise ConfigurationError(f"{label} {neighbor} does not exist: expected 0 to {size - 1}")
        if neighbor == rank:
            raise ConfigurationError(
                f"{label} is the rank itself; the share that a rank keeps is its self_weight, not an edge"
            )
        if times > 1:
            raise ConfigurationError(f"{label} {neighbor} is listed {times} times, expected once")


def check_connected(graphs: GraphSequence) -> None:
    """Check that the union of the graphs of one period is strongly connected.

    Raises:
        ConfigurationError: if information from one rank never reaches another; names the two ranks.
    """
    steps = range(graphs.lead_steps, graphs.lead_steps + graphs.period_steps)
    receivers: list[set[int]] = [set() for _ in range(graphs.size)]
    senders: list[set[int]] = [set() for _ in range(graphs.size)]
    for step in steps:
        for sender, receiver in graphs.messages(step):
            receivers[sender].add(receiver)
            senders[receiver].add(sender)
    for rank in sorted(set(range(graphs.size)) - _reached_from_zero(receivers)):
        raise ConfigurationError(_disconnected(graphs, source=0, unreached=rank))
    for rank in sorted(set(range(graphs.size)) - _reached_from_zero(senders)):
        raise ConfigurationError(_disconnected(graphs, source=rank, unreached=0))


def _reached_from_zero(edges: list[set[int]]) -> set[int]:
    reached, frontier = {0}, [0]
    while frontier:
        new: Iterable[int] = edges[frontier.pop()] - reached
        reached.update(new)
        frontier.extend(new)
    return reached


def _disconnected(graphs: GraphSequence, *, source: int, unreached: int) -> str:
    over = "" if graphs.period_steps == 1 else f", not over all {graphs.period_steps} steps of its period"
    return (
        f"{graphs.name} is disconnected: nothing of rank {source} ever reaches rank {unreached}{over}. "
        "Add edges until information from every rank reaches every other, directly or through other ranks"
    )
