"""Topologies of gossip: which ranks exchange messages at each step, and with which shares.

A description such as ``OnePeerExponential()`` is independent of the number of ranks. Its method ``for_size(n)`` returns
a plan for n ranks, whose method ``peers(rank, step)`` returns neighbours and shares. Nothing here communicates.

Example:
    >>> from lentando.comm.topology import OnePeerExponential
    >>> graphs = OnePeerExponential().for_size(8)
    >>> print(graphs)
    OnePeerExponential among 8 ranks: 3 graphs, doubly stochastic, spectral gap 1 per step
    >>> [graphs.peers(rank=0, step=step).out_neighbors for step in range(3)]
    [((1, 0.5),), ((2, 0.5),), ((4, 0.5),)]
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
