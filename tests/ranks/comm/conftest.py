"""What tests of reductions within nodes need."""

import pytest

from lentando.comm.capabilities import SharedNode
from lentando.comm.transport import Transport


@pytest.fixture
def several(transport: Transport) -> Transport:
    """The transport of a job of more than one rank, which knows which of them share a node."""
    if transport.size == 1:
        pytest.skip("one rank has no neighbour")
    if not isinstance(transport, SharedNode):
        pytest.skip(f"transport {transport.name} does not know which ranks share a node")
    return transport
