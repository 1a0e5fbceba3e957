"""Whether a sequence of graphs holds together: for topologies of users, and for the tests of ours."""

from collections import Counter
from collections.abc import Iterable

from lentando.comm.errors import ConfigurationError
from lentando.comm.topology.base import GraphSequence
from lentando.comm.topology.spectrum import SUM_TOLERANCE

__all__ = ["check_connected", "check_graphs"]


def check_graphs(graphs: GraphSequence) -> None:
    """Check everything that gossip relies on, in every graph of the sequence.

    Raises:
        ConfigurationError: naming graph and rank, if a neighbour does not exist, is the rank itself or comes twice;
            if a share is not positive or a rank's shares do not sum to 1; if one rank sends what the other does not
            expect; or if the ranks are not connected.
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
        gives, awaits = sent.get((sender, receiver)), expected.get((sender, receiver))
        if gives != awaits:
            raise ConfigurationError(
                f"{graphs.name}, graph {phase}: rank {sender} sends rank {receiver} {_in_words(gives)}, "
                f"which expects {_in_words(awaits)}"
            )


def _in_words(share: float | None) -> str:
    return "nothing" if share is None else f"a share of {share:g}"


def _check_neighbors(neighbors: list[int], rank: int, size: int, what: str) -> None:
    for neighbor, times in Counter(neighbors).items():
        if not 0 <= neighbor < size:
            raise ConfigurationError(f"{what} {neighbor} does not exist: expected 0 to {size - 1}")
        if neighbor == rank:
            raise ConfigurationError(f"{what} is the rank itself; what a rank keeps is its self_weight, no edge")
        if times > 1:
            raise ConfigurationError(f"{what} {neighbor} comes {times} times, expected once")


def check_connected(graphs: GraphSequence) -> None:
    """Check that the union of the graphs of one period is strongly connected: all hear of all.

    Raises:
        ConfigurationError: naming two ranks of which one never hears of the other.
    """
    steps = range(graphs.lead_steps, graphs.lead_steps + graphs.period_steps)
    receivers: list[set[int]] = [set() for _ in range(graphs.size)]
    senders: list[set[int]] = [set() for _ in range(graphs.size)]
    for rank in range(graphs.size):
        for step in steps:
            for receiver, _ in graphs.peers(rank, step).out_neighbors:
                receivers[rank].add(receiver)
                senders[receiver].add(rank)
    for rank in sorted(set(range(graphs.size)) - _reached_from_zero(receivers)):
        raise ConfigurationError(_disconnected(graphs, hears_nothing=rank, of=0))
    for rank in sorted(set(range(graphs.size)) - _reached_from_zero(senders)):
        raise ConfigurationError(_disconnected(graphs, hears_nothing=0, of=rank))


def _reached_from_zero(edges: list[set[int]]) -> set[int]:
    reached, frontier = {0}, [0]
    while frontier:
        found: Iterable[int] = edges[frontier.pop()] - reached
        reached.update(found)
        frontier.extend(found)
    return reached


def _disconnected(graphs: GraphSequence, *, hears_nothing: int, of: int) -> str:
    over = "" if graphs.period_steps == 1 else f", not over all {graphs.period_steps} steps of its period"
    return (
        f"{graphs.name} is disconnected: nothing of rank {of} ever reaches rank {hears_nothing}{over}. "
        "Add edges until every rank hears of every other, directly or through others"
    )
