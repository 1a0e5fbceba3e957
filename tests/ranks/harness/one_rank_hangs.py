import numpy as np

from lentando.comm.transport import Transport


def test_last_rank_waits_for_a_message_that_no_rank_sends(transport: Transport) -> None:
    if transport.rank == transport.size - 1:
        transport.exchange([], [(0, np.empty(1))]).wait()
