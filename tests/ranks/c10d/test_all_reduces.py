"""All-reduces by each of the ways that sizes and places of ranks choose, and calls that differ between ranks."""

import gc
import re
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from itertools import accumulate
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.distributed import DistBackendError, ReduceOp

from lentando.c10d import reducing
from lentando.c10d.waiting import Waiting
from lentando.comm.reductions import direct

LENGTHS = (7, 30_001, 2_000_003)
"""Elements of float32: what one round of messages carries, two rounds, and several pieces of staging memory."""
PLACES = ("one node", "a node each", "a node each, a ring")


@pytest.fixture(params=PLACES)
def placed(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A new group; as if each of its ranks were alone on a node, if so named: this machine is one node."""
    made: Any = dist.new_group(list(range(dist.get_world_size())), timeout=timedelta(seconds=30))
    if request.param != "one node":
        monkeypatch.setattr(made._transport, "local_size", 1)
        monkeypatch.setattr(made._reducing, "_is_one_node", dist.get_world_size() == 1)
    if request.param == "a node each, a ring":
        monkeypatch.setattr(reducing, "DIRECT_PART_BYTES", 1)
    yield made
    dist.destroy_process_group(made)


def terms(length: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(length)
    return [torch.randn(length, generator=generator).to(dtype) for _ in range(dist.get_world_size())]


@pytest.mark.parametrize("length", LENGTHS)
def test_sums_and_means_are_equal_on_all_ranks(placed: Any, length: int) -> None:
    """Within rounding of the sum in double precision: a ring adds in an order of its own."""
    for dtype in (torch.float32, torch.bfloat16):
        for op in (ReduceOp.SUM, ReduceOp.AVG):
            by_rank = terms(length, dtype)
            tensor = by_rank[dist.get_rank()].clone()
            dist.all_reduce(tensor, op, group=placed)
            *_, total = accumulate(each.double() for each in by_rank)
            expected = total / len(by_rank) if op == ReduceOp.AVG else total
            tolerance = 1e-5 if dtype is torch.float32 else 1e-2
            torch.testing.assert_close(tensor.double(), expected, rtol=tolerance, atol=tolerance)
            everywhere = [torch.empty_like(tensor) for _ in by_rank]
            dist.all_gather(everywhere, tensor)
            assert all(torch.equal(each, tensor) for each in everywhere)


def test_several_tensors_in_one_call_and_several_calls_in_flight(placed: Any) -> None:
    """The first call of a group opens what its ranks share; in later ones, the first tensor is compared on its way."""
    size = dist.get_world_size()
    lengths = (0, 300_001, 5, 500_000, 300_001)
    for _ in range(3):
        works, filled = [], []
        for value in (1.0, 2.0, 3.0):
            tensors = [torch.full((length,), value) for length in lengths]
            works.append(placed.allreduce(tensors))
            filled.append((tensors, value * size))
        for work in works:
            work.wait()
        for tensors, total in filled:
            assert all((tensor == total).all() for tensor in tensors)


@pytest.mark.parametrize("length", [7, 1500])
def test_calls_in_flight_with_the_same_memory_follow_each_other(
    placed: Any, length: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the first call still receives is not sent ahead for the second one, which adds up the sums of the first."""
    size, count = dist.get_world_size(), 6
    tensor = torch.ones(length)
    # Messages so short that MPI copies them at once, as it does with longer ones between nodes.
    monkeypatch.setattr(direct, "IN_ONE_ROUND_BYTES", 0)
    if dist.get_rank() == 0:  # the others wait for its sums
        add_up = placed._reducing._direct._add_up

        def add_up_late(*arguments: Any) -> None:
            time.sleep(0.01)
            add_up(*arguments)

        monkeypatch.setattr(placed._reducing._direct, "_add_up", add_up_late)
    works = [
        dist.all_reduce(tensor[number % 2 :], group=placed, async_op=True)  # the same memory, and most of it
        for number in range(count)
    ]
    for work in works:
        assert work is not None
        work.wait()
    assert (tensor[1:] == size**count).all()
    assert tensor[0] == size ** (count // 2)


def test_calls_without_tensors_and_with_views_that_negate_follow_others_in_flight(placed: Any) -> None:
    """There is nothing to be sent ahead for them, or not where the sum is to be stored."""
    size, count = dist.get_world_size(), 10
    dist.all_reduce(torch.ones(1), group=placed)
    plain = [torch.ones(30_001) for _ in range(count)]
    negated = [torch.complex(torch.ones(1), -torch.ones(1)).conj().imag for _ in range(count)]
    assert all(tensor.is_neg() and tensor.is_contiguous() for tensor in negated)
    works = []
    for first, second in zip(plain, negated, strict=True):
        works += [
            placed.allreduce([first]),
            placed.allreduce([]),
            placed.allreduce([first]),
            placed.allreduce([second]),
        ]
    for work in works:
        work.wait()
    assert all((tensor == size**2).all() for tensor in plain)
    assert [tensor.item() for tensor in negated] == [size] * count


@pytest.mark.parametrize("length", LENGTHS[1:])
@pytest.mark.parametrize("is_first", [True, False])
def test_calls_that_differ_are_an_error_before_tensors_change(placed: Any, length: int, is_first: bool) -> None:
    """On every rank at once, although the data are on their way."""
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return
    if not is_first:
        for each in LENGTHS:
            dist.all_reduce(torch.ones(each), group=placed)
    tensor = torch.ones(length)
    options: Any = dist.BroadcastOptions()
    if rank == size - 1:
        work = placed.broadcast([tensor], options)
    else:
        work = placed.allreduce([tensor[:-1] if rank == 0 and size > 2 else tensor])
    with pytest.raises(DistBackendError, match="not about to do the same thing") as error:
        work.wait()
    assert (tensor == 1).all()
    assert re.search(rf"broadcast\(0, {length} x float32\)", str(error.value))
    with pytest.raises(DistBackendError, match="not possible any more"):
        dist.barrier(group=placed)


def test_longer_messages_of_calls_that_differ_are_not_received(placed: Any) -> None:
    """Open MPI 5 would write what is longer than a receive beyond its end."""
    dist.all_reduce(torch.ones(1), group=placed)
    guarded = np.full(1 << 20, 9, np.uint8)
    placed._reducing._direct._scratch = guarded[: 1 << 18]
    if dist.get_world_size() > 1:
        with pytest.raises(DistBackendError, match="not about to do the same thing"):
            dist.all_reduce(torch.ones(50_000 if dist.get_rank() == 0 else 10_000), group=placed)
    dist.barrier()  # MPI makes progress with whatever is in flight
    assert (guarded == 9).all()


def test_messages_that_arrive_after_a_timeout_fill_no_memory_of_other_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    group: Any = dist.new_group(list(range(dist.get_world_size())))
    dist.all_reduce(torch.ones(1), group=group)
    is_late = dist.get_rank() > 0
    add_up = group._reducing._direct._add_up

    def add_up_late(*arguments: Any) -> None:
        time.sleep(1.5)
        add_up(*arguments)

    if is_late:
        monkeypatch.setattr(group._reducing._direct, "_add_up", add_up_late)
    options: Any = dist.AllreduceOptions()
    options.timeout = timedelta(seconds=5.0 if is_late else 0.5)
    dist.barrier()
    with suppress(DistBackendError):  # rank 0 has a timeout while the second round of messages is due
        group.allreduce([torch.ones(60_000)], options).wait()
    gc.collect()
    others = [torch.full((60_000,), 7.0) for _ in range(4)]
    dist.barrier()
    assert all((other == 7).all() for other in others)
    dist.destroy_process_group(group)


def test_waits_between_nodes_sleep_from_the_first_poll(monkeypatch: pytest.MonkeyPatch) -> None:
    """A thread that yields a busy processor loses time slices, which a link would be idle for."""
    slept: list[float] = []
    monkeypatch.setattr("lentando.c10d.waiting.time.sleep", slept.append)
    for spins in (True, False):
        waiting = Waiting(lambda: None, spins=spins)
        waiting.begin("a call", 10.0)
        waiting()
        assert bool(slept) is not spins
