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
    next_message = transport.next_message

    def find_slowly(tag: int, source: int | None) -> tuple[int, int] | None:
        found: tuple[int, int] | None = next_message(tag, source)
        time.sleep(0.002)  # time for the other thread to find the same message
        return found

    monkeypatch.setattr(transport, "next_message", find_slowly)
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


@pytest.mark.parametrize("longest", [None, 4000])
@pytest.mark.parametrize(("sent", "expected"), [(LONG, 1000), (1500, 1000), (2000, 1000), (LONG, LONG - 1), (3, 0)])
def test_message_that_is_too_long_is_refused_before_memory_is_written(
    monkeypatch: pytest.MonkeyPatch, sent: int, expected: int, longest: int | None
) -> None:
    """Open MPI 5 would write a longer one beyond the end; between nodes, MPI carries a long one in pieces."""
    rank, after, before = neighbors()
    if longest is not None:
        transport: Any = dist.group.WORLD._messages._transport  # type: ignore[union-attr]
        monkeypatch.setattr(transport, "longest_message", lambda peer: longest)
    tag = 20 if longest is None else 21 + (sent + 2 * expected) % 999  # pieces of a refused message may stay
    guarded = torch.full((LONG + 1000,), 9.0)
    sending = dist.isend(torch.full((sent,), float(rank)), after, tag=tag)
    with pytest.raises(dist.DistBackendError, match=rf"rank {rank} receives into a tensor of {4 * expected} bytes"):
        dist.recv(guarded[:expected], before, tag=tag)
    assert (guarded[expected:] == 9).all()
    if longest is None:  # the message is still there
        assert (guarded == 9).all()
        dist.recv(guarded[:sent], before, tag=tag)
        assert (guarded[:sent] == before).all()
        assert sending is not None
        sending.wait()
    dist.barrier()


@pytest.mark.parametrize("longest", [None, 4000])
@pytest.mark.parametrize("sent", [0, 1, 1000, 1500])
def test_shorter_message_fills_the_first_elements(
    monkeypatch: pytest.MonkeyPatch, sent: int, longest: int | None
) -> None:
    """As over gloo. The one after it is not mixed with it."""
    rank, after, before = neighbors()
    if longest is not None:
        transport: Any = dist.group.WORLD._messages._transport  # type: ignore[union-attr]
        monkeypatch.setattr(transport, "longest_message", lambda peer: longest)
    for value in (rank + 1.0, -rank - 1.0):
        sending = dist.isend(torch.full((sent,), value), after, tag=14)
        received = torch.zeros(3000)
        dist.recv(received, before, tag=14)
        assert sending is not None
        sending.wait()
        assert (received[:sent] == (before + 1 if value > 0 else -before - 1)).all()
        assert (received[sent:] == 0).all()
    dist.barrier()


def test_receives_take_messages_in_the_order_of_their_start() -> None:
    """Whichever is waited for first, and although they look for messages only when they are asked."""
    _, after, before = neighbors()
    first, second, third = (torch.empty(2) for _ in range(3))
    works = [dist.irecv(first, before, tag=13), dist.irecv(second, tag=13), dist.irecv(third, before, tag=13)]
    dist.barrier()
    for value in range(3):
        dist.send(torch.full((2,), float(value)), after, tag=13)
    for work in reversed(works):
        assert work is not None
        work.wait()
    assert [tensor[0].item() for tensor in (first, second, third)] == [0, 1, 2]
    dist.barrier()
