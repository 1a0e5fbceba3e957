"""Collectives as programs call them that are not about gradients: objects, functions with gradients, messages."""

from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.distributed.nn.functional as differentiable
from training import Tensors


def objects() -> Tensors:
    rank, size = dist.get_rank(), dist.get_world_size()
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "a" * rank})
    assert gathered == [{"rank": each, "text": "a" * each} for each in range(size)]
    shared = [rank, "b" * (rank + 1)]
    dist.broadcast_object_list(shared, src=size - 1)
    assert shared == [size - 1, "b" * size]
    at_root: list[Any] | None = [None] * size if rank == 1 else None
    dist.gather_object(rank * "c", at_root, dst=1)
    assert at_root == ([each * "c" for each in range(size)] if rank == 1 else None)
    received: list[Any] = [None]
    dist.scatter_object_list(received, [f"to {each}" for each in range(size)], src=0)
    assert received == [f"to {rank}"]
    return {}


def functions_with_gradients() -> Tensors:
    rank, size = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(rank)
    found = {}
    for name, function in {
        "all_reduce": differentiable.all_reduce,
        "all_gather": lambda each: torch.stack(differentiable.all_gather(each)),
        "all_to_all": lambda each: torch.stack(
            differentiable.all_to_all([torch.empty(2) for _ in range(size)], list(each.view(-1)[: 2 * size].split(2)))
        ),
        "reduce_scatter": lambda each: differentiable.reduce_scatter(torch.empty(4), [each + to for to in range(size)]),
    }.items():
        inputs = torch.randn(4 if name != "all_to_all" else 2 * size, requires_grad=True)
        outputs = function(inputs)
        outputs.square().sum().backward()
        assert inputs.grad is not None
        found |= {name: outputs, f"gradient of {name}": inputs.grad}
    return found


def functions_that_return_new_tensors() -> Tensors:
    """The collectives that compiled programs and DTensor call."""
    group, rank, size = dist.group.WORLD, dist.get_rank(), dist.get_world_size()
    assert group is not None
    each = torch.arange(4.0 * size) + rank
    splits = [4] * size
    return {
        name: value + 0
        for name, value in {
            "sum": functional.all_reduce(each, "sum", group),
            "mean": functional.all_reduce(each, "avg", group),
            "largest": functional.all_reduce(each, "max", group),
            "gathered": functional.all_gather_tensor(each, 0, group),
            "scattered": functional.reduce_scatter_tensor(each, "sum", 0, group),
            "turned": functional.all_to_all_single(each, splits, splits, group),
            "broadcast": functional.broadcast(each, 1, group),
            "all of two": torch.cat(functional.all_reduce_coalesced([each, each * 2], "sum", group)),
        }.items()
    }


def messages_around_a_ring() -> Tensors:
    rank, size = dist.get_rank(), dist.get_world_size()
    sent, received = torch.arange(5.0) + rank, torch.zeros(5)
    operations = [
        dist.P2POp(dist.isend, sent, (rank + 1) % size),
        dist.P2POp(dist.irecv, received, (rank - 1) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    anyone = torch.zeros(1)
    if rank == 0:
        total = 0.0
        for _ in range(size - 1):
            source = dist.recv(anyone)
            assert float(anyone) == source
            total += float(anyone)
        anyone.fill_(total)
    else:
        dist.send(torch.tensor([float(rank)]), 0)
    return {"received": received} | ({"of all": anyone} if rank == 0 else {})


def many_at_once() -> Tensors:
    """Sums in flight together, of sizes from nothing to a megabyte, awaited in the opposite order."""
    sizes = (0, 1, 3, 1000, 250_000, 17)
    tensors = [torch.arange(float(size)) + dist.get_rank() for size in sizes]
    works = [dist.all_reduce(each, async_op=True) for each in tensors]
    for work in reversed(works):
        assert work is not None
        work.wait()
    return {str(size): tensor for size, tensor in zip(sizes, tensors, strict=True) if size}
