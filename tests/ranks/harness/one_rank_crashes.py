import os

from lentando.comm.transport import Transport


def test_last_rank_disappears(transport: Transport) -> None:
    if transport.rank == transport.size - 1:
        os._exit(9)
    transport.barrier()
