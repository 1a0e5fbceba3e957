"""Who sends to whom at each step, and how much: described without a world size, planned for one, pure arithmetic.

A description such as ``OnePeerExponential()`` becomes a plan by ``for_size(n)``; the plan answers ``peers(rank,
step)``. Nothing here communicates.
"""

from lentando.comm.topology.base import GraphSequence, Topology
from lentando.comm.topology.checks import check_graphs
from lentando.comm.topology.circulant import (
    Circulant,
    Complete,
    OnePeerExponential,
    PPeerExponential,
    Ring,
    StaticExponential,
)
from lentando.comm.topology.combined import Hybrid, NodeAware
from lentando.comm.topology.given import FromGraph, FromMatrix
from lentando.comm.topology.peers import Peers
from lentando.comm.topology.spectrum import Stochasticity, second_modulus, stochasticity
from lentando.comm.topology.symmetric import BipartiteExponential, Hypercube, OnePeerHypercube, Torus

__all__ = [
    "BipartiteExponential",
    "Circulant",
    "Complete",
    "FromGraph",
    "FromMatrix",
    "GraphSequence",
    "Hybrid",
    "Hypercube",
    "NodeAware",
    "OnePeerExponential",
    "OnePeerHypercube",
    "PPeerExponential",
    "Peers",
    "Ring",
    "StaticExponential",
    "Stochasticity",
    "Topology",
    "Torus",
    "check_graphs",
    "second_modulus",
    "stochasticity",
]
