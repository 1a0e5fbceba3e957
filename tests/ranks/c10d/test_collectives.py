"""Each collective of torch.distributed against a line of NumPy, for all dtypes."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import distributed as dist
from torch.distributed import ReduceOp

all_gather_single = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_single = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor  # their older names

DTYPES = [
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int16, torch.int32,
    torch.int64, torch.complex64, torch.complex128, torch.bool,
]  # fmt: skip
SHAPES = [(5,), (0,), (3, 4), ()]
LONG = 300_001
"""Elements of an array that shared memory carries, which is divided unequally."""


def values(rank: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Small integers, whose sums and products over a few ranks every dtype holds."""
    numbers = np.random.default_rng([seed, rank]).integers(0, 3, shape)
    return torch.as_tensor(numbers).to(dtype)


def all_values(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> list[torch.Tensor]:
    return [values(rank, shape, dtype, seed) for rank in range(dist.get_world_size())]


def mine(shape: tuple[int, ...], dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return values(dist.get_rank(), shape, dtype, seed)


def as_numpy(tensors: list[torch.Tensor]) -> np.ndarray[Any, Any]:
    return np.stack([tensor.to(torch.complex128).numpy() for tensor in tensors])


def equal(found: torch.Tensor, expected: Any) -> None:
    np.testing.assert_array_equal(found.to(torch.complex128).numpy(), np.asarray(expected, np.complex128))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sum_and_moves_of_every_dtype_and_shape(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    rank, size = dist.get_rank(), dist.get_world_size()
    everything = as_numpy(all_values(shape, dtype))
    total = everything.sum(0) if dtype is not torch.bool else everything.any(0)

    tensor = mine(shape, dtype)
    dist.all_reduce(tensor)
    equal(tensor, total)
    root = size - 1
    tensor = mine(shape, dtype)
    dist.reduce(tensor, root)
    if rank == root:
        equal(tensor, total)
    tensor = mine(shape, dtype)
    dist.broadcast(tensor, root)
    equal(tensor, everything[root])
    gathered = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(gathered, mine(shape, dtype))
    for found, expected in zip(gathered, everything, strict=True):
        equal(found, expected)
    if rank == root:
        dist.gather(mine(shape, dtype), gathered, dst=root)
        equal(torch.stack(gathered), everything)
        dist.scatter(tensor, [each + each for each in all_values(shape, dtype)], src=root)
    else:
        dist.gather(mine(shape, dtype), dst=root)
        dist.scatter(tensor, src=root)
    equal(tensor, everything[rank] * (2 if dtype is not torch.bool else 1))
    dist.all_to_all(gathered, [mine(shape, dtype, seed) for seed in range(size)])
    for source, found in enumerate(gathered):
        equal(found, as_numpy([values(source, shape, dtype, rank)])[0])


REFERENCES: dict[str, Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]] = {
    "SUM": lambda rows: rows.sum(0),
    "PRODUCT": lambda rows: rows.prod(0),
    "MIN": lambda rows: rows.min(0),
    "MAX": lambda rows: rows.max(0),
    "BAND": np.bitwise_and.reduce,
    "BOR": np.bitwise_or.reduce,
    "BXOR": np.bitwise_xor.reduce,
}


@pytest.mark.parametrize("op", REFERENCES)
@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.bool], ids=str)
def test_reductions_of_integers_and_booleans(op: str, dtype: torch.dtype) -> None:
    rows = np.stack([each.to(torch.int64).numpy() for each in all_values((7,), dtype)])
    expected = REFERENCES[op](rows)
    if dtype is torch.bool:
        expected = expected % 2 if op == "BXOR" else expected > 0
    tensor = mine((7,), dtype)
    dist.all_reduce(tensor, getattr(ReduceOp, op))
    equal(tensor, expected)
    size = dist.get_world_size()
    output = torch.empty(7, dtype=dtype)
    dist.reduce_scatter(output, [mine((7,), dtype) for _ in range(size)], getattr(ReduceOp, op))
    equal(output, expected)


@pytest.mark.parametrize("op", ["SUM", "AVG", "MIN", "MAX", "PRODUCT"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("length", [9, LONG])
def test_reductions_of_floating_point(op: str, dtype: torch.dtype, length: int) -> None:
    size = dist.get_world_size()
    rows = as_numpy(all_values((length,), dtype)).real
    expected = torch.from_numpy(rows.mean(0) if op == "AVG" else REFERENCES[op](rows)).to(dtype)
    tensor = mine((length,), dtype)
    dist.all_reduce(tensor, getattr(ReduceOp, op))
    torch.testing.assert_close(tensor, expected)
    everywhere = [torch.empty_like(tensor) for _ in range(size)]
    dist.all_gather(everywhere, tensor)
    assert all(torch.equal(each, tensor) for each in everywhere)
    output = torch.empty(length, dtype=dtype)
    reduce_scatter_single(output, mine((length,), dtype).repeat(size), getattr(ReduceOp, op))
    torch.testing.assert_close(output, expected)


def test_values_that_are_not_finite_reach_all_ranks() -> None:
    tensor = torch.zeros(3)
    tensor[0] = float("nan") if dist.get_rank() == 0 else 1.0
    for op in (ReduceOp.SUM, ReduceOp.MIN, ReduceOp.MAX, ReduceOp.AVG):
        reduced = tensor.clone()
        dist.all_reduce(reduced, op)
        assert reduced[0].isnan()
        assert not reduced[1:].isnan().any()


def test_tensors_that_are_not_contiguous() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    whole = torch.zeros(4, 6)
    view = whole.t()[1:4:2]
    view.fill_(rank + 1)
    dist.all_reduce(view)
    total = size * (size + 1) / 2
    assert (view == total).all()
    assert whole.sum() == total * view.numel(), "elements outside of the view have changed"
    images = torch.full((2, 3, 4, 4), float(rank)).contiguous(memory_format=torch.channels_last)
    dist.broadcast(images, size - 1)
    assert (images == size - 1).all()
    assert images.is_contiguous(memory_format=torch.channels_last)
    rows = [torch.empty(3, 2).t() for _ in range(size)]
    dist.all_gather(rows, torch.arange(6.0).view(3, 2).t() + rank)
    for source, row in enumerate(rows):
        assert torch.equal(row, torch.arange(6.0).view(3, 2).t() + source)


def test_collectives_of_one_flat_tensor() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    output = torch.empty(size, 3)
    all_gather_single(output, mine((3,)))
    equal(output, as_numpy(all_values((3,), torch.float32)))
    output = torch.empty(3)
    reduce_scatter_single(output, torch.arange(3.0 * size) + rank)
    equal(output, sum(np.arange(3.0 * size) + each for each in range(size))[3 * rank : 3 * rank + 3])
    received = torch.empty(2 * size)
    dist.all_to_all_single(received, torch.arange(2.0 * size) + 100 * rank)
    equal(received, np.concatenate([np.arange(2 * rank, 2 * rank + 2) + 100 * source for source in range(size)]))


def test_all_to_all_with_unequal_splits() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    sends = [(rank + target) % 3 for target in range(size)]
    receives = [(source + rank) % 3 for source in range(size)]
    rows = torch.full((sum(sends), 2), float(rank))
    received = torch.empty(sum(receives), 2)
    dist.all_to_all_single(received, rows, receives, sends)
    equal(received, np.repeat(np.arange(size), receives)[:, None] * np.ones(2))


def test_objects() -> None:
    size, rank = dist.get_world_size(), dist.get_rank()
    gathered: list[Any] = [None] * size
    dist.all_gather_object(gathered, {"rank": rank, "text": "x" * rank})
    assert gathered == [{"rank": each, "text": "x" * each} for each in range(size)]
    sent = [("from", size - 1) if rank == size - 1 else None]
    dist.broadcast_object_list(sent, size - 1)
    assert sent == [("from", size - 1)]


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.uint64], ids=str)
def test_averages_of_integers_whose_sum_the_dtype_may_not_hold(dtype: torch.dtype) -> None:
    size = dist.get_world_size()
    name = str(dtype).removeprefix("torch.")
    largest = int(np.iinfo(name).max) // (size if name.endswith("64") else 1)
    row = torch.from_numpy(np.array([largest, 3, largest], name))
    reduced = row.clone()
    dist.all_reduce(reduced, ReduceOp.AVG)
    output = torch.from_numpy(np.zeros(3, name))
    dist.reduce_scatter(output, [row.clone() for _ in range(size)], ReduceOp.AVG)
    np.testing.assert_array_equal(reduced.numpy(), row.numpy())
    np.testing.assert_array_equal(output.numpy(), row.numpy())
