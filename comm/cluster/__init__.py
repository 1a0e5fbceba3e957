"""Descriptions of a cluster, shared by the simulator and the delay model: how long steps take, how fast links are."""

from lentando.comm.cluster.compute import Compute, Distribution
from lentando.comm.cluster.network import Link, Network, SharedLink

__all__ = ["Compute", "Distribution", "Link", "Network", "SharedLink"]
