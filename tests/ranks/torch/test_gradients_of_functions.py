"""Gradients of the collectives: Horovod's definitions, which are collectives themselves."""

from collections.abc import Callable

import pytest
import torch

import lentando.torch as lt

DTYPES = [torch.float32, torch.float64, torch.float16]


def own(length: int = 2, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.full((length, 2), float(lt.rank() + 1), dtype=dtype, requires_grad=True)


def cotangent(tensor: torch.Tensor, rank: int | None = None) -> torch.Tensor:
    """A gradient of the result of the given shape, which differs between ranks."""
    rank = lt.rank() if rank is None else rank
    return (torch.arange(tensor.numel(), dtype=torch.float64) + 4 * rank).reshape(tensor.shape).to(tensor.dtype)


def total(tensor: torch.Tensor) -> torch.Tensor:
    return sum((cotangent(tensor, rank) for rank in range(lt.size())), torch.zeros_like(tensor))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("is_grouped", [False, True])
def test_allreduce_reduces_the_gradients_in_the_same_way(dtype: torch.dtype, is_grouped: bool) -> None:
    for op, divisor in ((lt.Average, lt.size()), (lt.Sum, 1)):
        tensor = own(dtype=dtype)
        options = {"op": op, "prescale_factor": 0.5, "postscale_factor": 3.0}
        if is_grouped:
            result, other = lt.grouped_allreduce([2 * tensor, 4 * tensor], **options)
            assert torch.equal(other, 2 * result)
        else:
            result = lt.allreduce(2 * tensor, **options)
        result.backward(cotangent(result))
        torch.testing.assert_close(tensor.grad, (total(result) * 2 * 1.5 / divisor).to(dtype), rtol=1e-2, atol=0)


@pytest.mark.parametrize("is_grouped", [False, True])
def test_allgather_averages_the_gradients_of_this_ranks_part(is_grouped: bool) -> None:
    tensor = own(lt.rank() + 1)
    gathered = lt.grouped_allgather([tensor, 2 * tensor])[0] if is_grouped else lt.allgather(tensor)
    gathered.backward(cotangent(gathered))
    start = lt.rank() * (lt.rank() + 1) // 2
    torch.testing.assert_close(tensor.grad, (total(gathered) / lt.size())[start : start + lt.rank() + 1])


def test_allgather_of_a_scalar() -> None:
    scalar = torch.tensor(2.0, requires_grad=True)
    (lt.allgather(scalar) * torch.arange(1.0, lt.size() + 1)).sum().backward()
    assert scalar.grad is not None
    assert scalar.grad.item() == lt.rank() + 1


@pytest.mark.parametrize("root", [0, -1])
def test_broadcast_gives_the_average_to_the_root(root: int) -> None:
    root %= lt.size()
    tensor = own()
    result = lt.broadcast(tensor, root)
    result.backward(cotangent(result))
    expected = total(result) / lt.size() if lt.rank() == root else torch.zeros_like(result)
    torch.testing.assert_close(tensor.grad, expected)


@pytest.mark.parametrize("with_splits", [False, True])
def test_alltoall_sends_the_gradients_back(with_splits: bool) -> None:
    """Rank r sends r + 1 rows to each rank, or one row without splits. Row k of what it receives gets gradient k."""
    rows = lt.rank() + 1 if with_splits else 1
    tensor = own(rows * lt.size())
    found = lt.alltoall(tensor, [rows] * lt.size()) if with_splits else lt.alltoall(tensor)
    received = found[0] if with_splits else found
    expected = list(range(received.shape[0]))
    lengths = [rank + 1 if with_splits else 1 for rank in range(lt.size())]
    assert received[:, 0].tolist() == [rank + 1.0 for rank in range(lt.size()) for _ in range(lengths[rank])]
    received.backward(torch.tensor(expected, dtype=torch.float64).unsqueeze(1).expand_as(received) + 100 * lt.rank())
    start = sum(lengths[: lt.rank()])
    assert tensor.grad is not None
    assert tensor.grad[:, 0].tolist() == [
        100.0 * rank + start + row for rank in range(lt.size()) for row in range(rows)
    ]


@pytest.mark.parametrize("op", [lt.Average, lt.Sum])
@pytest.mark.parametrize("is_grouped", [False, True])
def test_reducescatter_gathers_the_gradients(op: lt.Op, is_grouped: bool) -> None:
    tensor = own(2 * lt.size() + 1)
    function: Callable[[torch.Tensor], torch.Tensor] = (
        (lambda given: lt.grouped_reducescatter([given, 3 * given], op=op, prescale_factor=2.0)[0])
        if is_grouped
        else (lambda given: lt.reducescatter(given, op=op, prescale_factor=2.0))
    )
    part = function(tensor)
    part.backward(torch.full_like(part, lt.rank() + 1))
    lengths = [3, *[2] * (lt.size() - 1)]
    expected = [float(rank + 1) for rank in range(lt.size()) for _ in range(lengths[rank])]
    factor = 2 * (lt.size() if op is lt.Sum else 1)
    assert tensor.grad is not None
    assert tensor.grad[:, 1].tolist() == [factor * value for value in expected]


def test_gradients_pass_through_compression() -> None:
    tensor = own(dtype=torch.float32)
    result = lt.allreduce(tensor * 2, compression=lt.Compression.fp16, op=lt.Sum)
    assert result.dtype is torch.float32
    result.sum().backward()
    assert (tensor.grad == 2 * lt.size()).all()


@pytest.mark.skipif(lt.size() == 1, reason="one rank has no other set than that of all ranks")
def test_gradients_within_a_process_set() -> None:
    pair = lt.add_process_set([0, lt.size() - 1] if lt.size() > 2 else [lt.size() - 1])
    try:
        if pair.included():
            tensor = own()
            result = lt.allreduce(tensor, op=lt.Sum, process_set=pair)
            assert (result == sum(rank + 1 for rank in pair.ranks)).all()
            result.backward(cotangent(result))
            torch.testing.assert_close(tensor.grad, sum(cotangent(result, rank) for rank in pair.ranks))
    finally:
        lt.remove_process_set(pair)
