"""What is Horovod's own: it runs next to ours, and its errors are ours."""

import time
from pathlib import Path

import numpy as np
import pytest

from lentando.comm import world
from lentando.comm.errors import TransportError
from lentando.comm.transport import Transport

if world.transport().name != "horovod":
    pytest.skip("these ranks are not Horovod's", allow_module_level=True)
torch = pytest.importorskip("torch")
hvd = pytest.importorskip("horovod.torch")


def neighbours(transport: Transport) -> tuple[int, int]:
    return (transport.rank + 1) % transport.size, (transport.rank - 1) % transport.size


def test_operations_of_the_users_run_next_to_ours(transport: Transport) -> None:
    """Theirs are in flight while ours begin and end, and the other way around."""
    to, source = neighbours(transport)
    size = transport.size
    for step in range(5):
        theirs = hvd.allreduce_async(torch.full((1000,), float(transport.rank)), op=hvd.Sum, name=f"theirs.{step}")
        received = np.empty(1000)
        request = transport.exchange([(to, np.full(1000, float(transport.rank)))], [(source, received)])
        ours = np.full(1000, float(transport.rank), np.float32)
        transport.allreduce(ours)
        assert (hvd.synchronize(theirs) == sum(range(size))).all()
        assert (ours == sum(range(size))).all()
        request.wait()
        assert (received == source).all()


def test_ranks_that_take_no_part_hold_up_no_exchange(transport: Transport, shared_path: Path) -> None:
    """Ranks 0 and 1 exchange; the others sleep until they have, in no call of ours."""
    if transport.size < 3:
        pytest.skip("needs a third rank")
    if transport.rank < 2:
        for step in range(10):
            received = np.empty(1)
            peer = 1 - transport.rank
            transport.exchange([(peer, np.full(1, float(step)))], [(peer, received)]).wait()
            assert received[0] == step
        (shared_path / str(transport.rank)).touch()
    while len(list(shared_path.iterdir())) < 2:
        time.sleep(0.01)
    transport.barrier()


def test_error_of_horovods_is_translated(transport: Transport) -> None:
    """Ranks that do not bring the same: each gets the error."""
    if transport.size == 1:
        pytest.skip("a world of one cannot disagree")
    with pytest.raises(TransportError, match="Horovod failed: .*Mismatched ALLREDUCE tensor shapes"):
        transport.allreduce(np.zeros(1 + transport.rank))
    transport.barrier()


def test_message_longer_than_its_receive_is_an_error(transport: Transport) -> None:
    to, source = neighbours(transport)
    sending = transport.exchange([(to, np.zeros(8))], [])
    with pytest.raises(TransportError, match="a message of 64 bytes met a receive of 16"):
        transport.exchange([], [(source, np.zeros(2))]).wait()
    sending.wait()
