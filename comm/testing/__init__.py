"""Conformance suites: what every implementation of a seam must pass, ours and a third party's.

Each ``check_*`` raises ``AssertionError`` and says in words which promise is broken. They need no test framework.
"""

from lentando.comm.testing.device_arrays import check_device_arrays
from lentando.comm.testing.elastic import check_elastic
from lentando.comm.testing.topology import check_topology
from lentando.comm.testing.transports import check_transport
from lentando.comm.transports.threads import ThreadTransport, run_ranks

__all__ = ["ThreadTransport", "check_device_arrays", "check_elastic", "check_topology", "check_transport", "run_ranks"]
