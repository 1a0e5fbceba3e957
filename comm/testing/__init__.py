"""Conformance suites for implementations of transports and topologies, those of third parties included.

Each ``check_*`` function raises an ``AssertionError`` that names the broken promise. No test framework is needed.
"""

from lentando.comm.testing.device_arrays import check_device_arrays
from lentando.comm.testing.elastic import check_elastic
from lentando.comm.testing.topology import check_topology
from lentando.comm.testing.transports import check_transport
from lentando.comm.transports.threads import ThreadTransport, run_ranks

__all__ = ["ThreadTransport", "check_device_arrays", "check_elastic", "check_topology", "check_transport", "run_ranks"]
