"""``check_topology`` accepts what is right and rejects what is wrong."""

from dataclasses import dataclass

import pytest

from lentando.comm.testing import check_topology
from lentando.comm.topology import (
    BipartiteExponential,
    Complete,
    GraphSequence,
    Hypercube,
    OnePeerExponential,
    Peers,
    PPeerExponential,
    Ring,
    StaticExponential,
    Topology,
)


@pytest.mark.parametrize(
    "topology",
    [Ring(), Complete(), StaticExponential(), OnePeerExponential(), PPeerExponential(2), BipartiteExponential()],
    ids=repr,
)
def test_our_own_topologies_conform(topology: Topology) -> None:
    check_topology(topology)


def test_hypercube_conforms_where_it_exists() -> None:
    check_topology(Hypercube(), sizes=(1, 2, 4, 8))
    with pytest.raises(AssertionError, match="among 3 ranks"):
        check_topology(Hypercube(), sizes=(3,))


class _Wrong(GraphSequence):
    def __init__(self, size: int, mistake: str) -> None:
        super().__init__(size, 1)
        self.mistake = mistake

    def peers_in(self, rank: int, phase: int) -> Peers:
        right, left = (rank + 1) % self.size, (rank - 1) % self.size
        return {
            "itself": Peers(((rank, 0.5),), ((rank, 0.5),), 0.5),
            "twice": Peers(((right, 0.25), (right, 0.25)), ((left, 0.25), (left, 0.25)), 0.5),
            "sum": Peers(((right, 0.4),), ((left, 0.4),), 0.5),
            "unexpected": Peers(((right, 0.5),), (), 0.5),
            "no rank": Peers((), (), 1.0),
            "negative": Peers(((right, -0.5),), ((left, -0.5),), 1.5),
        }[self.mistake]


@dataclass(frozen=True)
class Wrong(Topology):
    mistake: str

    def plan(self, size: int) -> GraphSequence:
        return _Wrong(size, self.mistake)


@pytest.mark.parametrize("mistake", ["itself", "twice", "sum", "unexpected", "no rank", "negative"])
def test_wrong_topologies_are_rejected(mistake: str) -> None:
    with pytest.raises(AssertionError, match=rf"Wrong\(mistake='{mistake}'\) among 4 ranks"):
        check_topology(Wrong(mistake), sizes=(4,))
