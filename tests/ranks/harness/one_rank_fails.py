from lentando.comm.transport import Transport


def test_last_rank_fails(transport: Transport) -> None:
    print("written before the failure")
    assert transport.rank != transport.size - 1, "this rank fails"
    transport.barrier()
