"""Messages between two ranks."""

import threading
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import distributed as dist

LONG = 400_000
"""Elements of a message that MPI does not send before its receive is posted."""


def neighbors() -> tuple[int, int, int]:
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        pytest.skip("no other rank")
    return rank, (rank + 1) % size, (rank - 1) % size


@pytest.mark.parametrize("length", [0, 1, LONG])
def test_ring_of_messages_in_both_directions(length: int) -> None:
    rank, after, before = neighbors()
    tensors = [torch.empty(length) for _ in range(2)]
    operations = [
        dist.P2POp(dist.isend, torch.full((length,), float(rank)), after, tag=1),
        dist.P2POp(dist.isend, torch.full((length,), -float(rank)), before, tag=2),
        dist.P2POp(dist.irecv, tensors[0], before, tag=1),
        dist.P2POp(dist.irecv, tensors[1], after, tag=2),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    assert (tensors[0] == before).all()
    assert (tensors[1] == -after).all()


def test_blocking_messages_with_tags_in_another_order() -> None:
    rank, _, _ = neighbors()
    if rank == 0:
        first = dist.isend(torch.tensor([1]), 1, tag=7)
        dist.send(torch.tensor([2]), 1, tag=8)
        assert first is not None
        first.wait()
    elif rank == 1:
        received = torch.empty(1, dtype=torch.int64)
        assert dist.recv(received, 0, tag=8) == 0
        assert received.item() == 2
        dist.recv(received, 0, tag=7)
        assert received.item() == 1


def test_receive_from_whichever_rank_sends() -> None:
    rank, _, _ = neighbors()
    if rank > 0:
        dist.send(torch.full((3, 2), float(rank)), 0)
        return
    size, received = dist.get_world_size(), torch.zeros(2, 3).t()  # not contiguous
    senders = []
    for _ in range(size - 1):
        senders.append(dist.recv(received))
        assert (received == senders[-1]).all()
    assert sorted(senders) == list(range(1, size))


def test_messages_and_collectives_are_in_no_order() -> None:
    rank, after, before = neighbors()
    received = torch.empty(LONG)
    receiving = dist.irecv(received, before)
    total = torch.ones(1)
    dist.all_reduce(total)
    sending = dist.isend(torch.full((LONG,), float(rank)), after)
    dist.barrier()
    assert sending is not None
    assert receiving is not None
    receiving.get_future().wait()
    sending.wait()
    assert (received == before).all()
    assert receiving.is_completed()
    assert receiving.is_success()


def test_objects_in_messages() -> None:
    rank, after, before = neighbors()
    received = [None, None]
    if rank % 2 == 0:
        dist.send_object_list([rank, {"text": "x" * rank}], after)
        dist.recv_object_list(received, before)
    else:
        dist.recv_object_list(received, before)
        dist.send_object_list([rank, {"text": "x" * rank}], after)
    assert received == [before, {"text": "x" * before}]


def test_tag_that_mpi_does_not_have() -> None:
    _, after, _ = neighbors()
    with pytest.raises(ValueError, match="expected a tag from 0 to 32766"):
        dist.send(torch.ones(1), after, tag=32768)


def test_several_receives_from_whichever_rank_sends_take_a_message_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads look for messages, the one that waits and the one that lets the others progress."""
    rank, _, _ = neighbors()
    size, tag = dist.get_world_size(), 11
    group: Any = dist.group.WORLD
    transport: Any = group._messages._transport
    sender_of_next = transport.sender_of_next

    def find_slowly(tag: int) -> int | None:
        sender: int | None = sender_of_next(tag)
        time.sleep(0.002)  # time for the other thread to find the same message
        return sender

    monkeypatch.setattr(transport, "sender_of_next", find_slowly)
    for number in range(10):
        values = [number * size + sender for sender in range(1, size)] * 3
        received = [torch.zeros(1, dtype=torch.int64) for _ in values] if rank == 0 else []
        works = [group.recv_anysource([each], tag) for each in received]
        dist.barrier()
        if rank > 0:
            for _ in range(3):
                dist.send(torch.tensor([number * size + rank]), 0, tag=tag)
        for work in reversed(works):
            work.wait(timedelta(seconds=20))
        if rank == 0:
            assert sorted(each.item() for each in received) == sorted(values)
            assert [each.item() % size for each in received] == [work.source_rank() for work in works]
    dist.barrier()


def test_wait_ends_in_time_while_another_thread_waits_for_the_same_message() -> None:
    rank, after, before = neighbors()
    tag, received = 12, torch.empty(1)
    work = dist.irecv(received, before, tag=tag)
    assert work is not None
    thread = threading.Thread(target=work.wait, args=(timedelta(seconds=30),))
    thread.start()
    future = work.get_future()
    time.sleep(0.2)
    started = time.monotonic()
    with pytest.raises(dist.DistBackendError, match="timeout of 0.5 s"):
        work.wait(timedelta(seconds=0.5))
    assert work.get_future() is future
    assert time.monotonic() - started < 25
    dist.barrier()  # no message was on its way before
    dist.send(torch.tensor([float(rank)]), after, tag=tag)
    thread.join(60)
    assert not thread.is_alive()
    future.wait()
    assert received.item() == before
