"""The transport of the job, whatever it stands on."""

from lentando.comm.testing import check_transport
from lentando.comm.transport import Transport


def test_transport_of_the_job_keeps_its_promises(transport: Transport) -> None:
    check_transport(transport)


def test_local_ranks_number_the_ranks_of_a_node(transport: Transport) -> None:
    """All ranks of these tests are on one node."""
    assert (transport.local_rank, transport.local_size) == (transport.rank, transport.size)
