"""The simulator keeps every promise of the seam, as MPI does."""

import pytest

from lentando.comm.simulation import Compute, Network, simulate
from lentando.comm.testing import check_transport


@pytest.mark.parametrize("size", [1, 2, 3, 5])
@pytest.mark.parametrize("network", [Network(), Network(1e-3, 1e6, 1e-2)], ids=["plain", "jitter"])
def test_keeps_every_promise_of_the_transport_protocol(size: int, network: Network) -> None:
    simulate(check_transport, size, network=network, compute=Compute(1e-3, "exponential"), local_size=2)
