"""Horovod's functions on tensors of every kind: shapes, dtypes, memory layouts, groups, splits, process sets."""

import math
import os
from typing import Any

import pytest
import torch

import lentando.torch as lt

DTYPES = [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64]
DTYPES += [torch.float16, torch.bfloat16, torch.float32, torch.float64]
KINDS = {
    "scalar": lambda: torch.tensor(2.0),
    "empty": lambda: torch.zeros(0, 3),
    "transposed": lambda: torch.arange(6.0).reshape(2, 3).t(),
    "strided": lambda: torch.arange(12.0).reshape(4, 3)[::2],
    "channels last": lambda: torch.arange(24.0).reshape(1, 2, 3, 4).contiguous(memory_format=torch.channels_last),
}

needs_other_sets = pytest.mark.skipif(lt.size() == 1, reason="one rank has no other set than that of all ranks")


@pytest.mark.parametrize("kind", KINDS)
def test_tensors_of_any_layout(kind: str) -> None:
    tensor = KINDS[kind]() * (lt.rank() + 1)
    one, ranks = KINDS[kind](), lt.size()
    total = one * (ranks * (ranks + 1) / 2)
    assert torch.equal(lt.allreduce(tensor, op=lt.Sum), total)
    assert torch.equal(lt.grouped_allreduce([tensor, one], op=lt.Sum)[1], one * ranks)
    assert torch.equal(lt.broadcast(tensor, ranks - 1), one * ranks)
    parts = [(one * (rank + 1)).reshape(one.shape or (1,)) for rank in range(ranks)]
    assert torch.equal(lt.allgather(tensor), torch.cat(parts))
    changed = tensor.clone()
    assert lt.allreduce_(changed, op=lt.Sum) is changed
    assert torch.equal(changed, total)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype(dtype: torch.dtype) -> None:
    ranks = lt.size()
    tensor = torch.tensor([1, 2, lt.rank()] * ranks).to(dtype)
    assert lt.allreduce(tensor, op=lt.Sum).tolist()[:3] == [ranks, 2 * ranks, ranks * (ranks - 1) / 2]
    assert lt.allreduce(tensor).tolist()[:2] == [1, 2]
    assert lt.allreduce(tensor, op=lt.Product).tolist()[:3] == [1, 2**ranks, 0]
    assert lt.allreduce(tensor, op=lt.Max).tolist()[:3] == [1, 2, ranks - 1]
    assert lt.reducescatter(tensor, op=lt.Sum).tolist() == [ranks, 2 * ranks, ranks * (ranks - 1) / 2]
    received = lt.alltoall(tensor)
    assert received.dtype is dtype
    assert received.tolist() == [value for rank in range(ranks) for value in (1, 2, rank)]


def test_averages_of_integers_are_rounded_towards_zero() -> None:
    values = torch.tensor([lt.rank(), -lt.rank(), 1])
    total = lt.size() * (lt.size() - 1) // 2
    assert lt.allreduce(values).tolist() == [total // lt.size(), -(total // lt.size()), 1]


def test_booleans_travel() -> None:
    flag = torch.tensor([lt.rank() == 0, True])
    assert lt.allgather(flag).tolist() == [True, True, *[False, True] * (lt.size() - 1)]
    assert lt.broadcast(flag, lt.size() - 1).tolist() == [lt.size() == 1, True]
    assert lt.allreduce(flag, op=lt.Max).tolist() == [True, True]


def test_adasum_adds_orthogonal_and_averages_parallel_tensors() -> None:
    orthogonal = torch.zeros(lt.size())
    orthogonal[lt.rank()] = 1
    torch.testing.assert_close(lt.allreduce(orthogonal, op=lt.Adasum), torch.ones(lt.size()))
    torch.testing.assert_close(lt.allreduce(torch.ones(3), op=lt.Adasum), torch.ones(3))


@pytest.mark.parametrize("splits_as", [list, torch.tensor])
def test_alltoall_with_splits(splits_as: Any) -> None:
    """Rank r sends r + k rows, which hold r, to rank k."""
    rank, ranks = lt.rank(), lt.size()
    splits = [rank + peer for peer in range(ranks)]
    tensor = torch.full((sum(splits), 2), rank)
    received, lengths = lt.alltoall(tensor, splits_as(splits))
    assert lengths.tolist() == [peer + rank for peer in range(ranks)]
    assert received[:, 1].tolist() == [peer for peer in range(ranks) for _ in range(peer + rank)]


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_reducescatter_divides_as_equally_as_possible(rows: int) -> None:
    tensor = torch.arange(float(rows)).unsqueeze(1) * (lt.rank() + 1)
    part = lt.reducescatter(tensor, op=lt.Average, postscale_factor=2.0)
    lengths = [math.ceil((rows - rank) / lt.size()) for rank in range(lt.size())]
    start = sum(lengths[: lt.rank()])
    assert part.shape == (lengths[lt.rank()], 1)
    torch.testing.assert_close(part[:, 0], torch.arange(float(start), start + len(part)) * (lt.size() + 1))
    with pytest.raises((lt.ConfigurationError, lt.MismatchError), match="scalar"):
        lt.reducescatter(torch.tensor(1.0))


@pytest.mark.parametrize(
    ("compression", "dtype"), [(lt.Compression.fp16, torch.float16), (lt.Compression.bf16, torch.bfloat16)]
)
def test_compression_rounds_what_is_sent(compression: Any, dtype: torch.dtype) -> None:
    tensor = torch.tensor([1 + 2**-12, 3.0]) * (lt.rank() + 1)
    found = lt.allreduce(tensor, compression=compression, op=lt.Max)
    assert torch.equal(found, (torch.tensor([1 + 2**-12, 3.0]) * lt.size()).to(dtype).float())
    integers = lt.allreduce(torch.tensor([2**20 + 1]), compression=compression, op=lt.Max)
    assert integers.tolist() == [2**20 + 1]


@needs_other_sets
def test_process_sets_take_part_alone() -> None:
    ranks = list(range(0, lt.size(), 2))
    even = lt.add_process_set(ranks)
    try:
        if even.included():
            assert lt.allreduce(torch.tensor([lt.rank()]), op=lt.Sum, process_set=even).item() == sum(ranks)
            assert lt.allgather(torch.tensor([lt.rank()]), process_set=even).tolist() == ranks
            assert lt.broadcast(torch.tensor(lt.rank()), ranks[-1], process_set=even).item() == ranks[-1]
            assert lt.broadcast_object({"from": lt.rank()}, ranks[-1], process_set=even) == {"from": ranks[-1]}
            assert lt.allgather_object(lt.rank(), process_set=even) == ranks
            lt.barrier(even)
        else:
            with pytest.raises(lt.ConfigurationError, match="process set"):
                lt.allreduce(torch.ones(1), process_set=even)
    finally:
        lt.remove_process_set(even)


@needs_other_sets
def test_optimizers_of_two_process_sets_average_apart() -> None:
    sets = [lt.add_process_set(ranks) for ranks in ([*range(1, lt.size())], [0]) if ranks]
    (mine,) = [one for one in sets if one.included()]
    try:
        for wrap in (
            lt.DistributedOptimizer,
            lambda sgd, **given: lt.SlowMo(sgd, period=1, slow_momentum=0.0, **given),
        ):
            model = torch.nn.Linear(2, 1, bias=False)
            torch.nn.init.zeros_(model.weight)
            optimizer = wrap(torch.optim.SGD(model.parameters(), lr=1.0), model=model, process_set=mine)
            (model(torch.ones(1, 2)) * (lt.rank() + 1)).sum().backward()
            optimizer.step()
            assert torch.allclose(model.weight, torch.full((1, 2), -sum(r + 1 for r in mine.ranks) / len(mine.ranks)))
            del optimizer
    finally:
        for one in sets:
            lt.remove_process_set(one)


@needs_other_sets
def test_a_rank_outside_of_the_process_set_trains_alone() -> None:
    first = lt.add_process_set([0])
    try:
        model = torch.nn.Linear(2, 1, bias=False)
        torch.nn.init.zeros_(model.weight)
        optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=1.0), process_set=first)
        (model(torch.ones(1, 2)) * (lt.rank() + 1)).sum().backward()
        optimizer.step()
        assert torch.equal(model.weight, torch.full((1, 2), -(lt.rank() + 1.0)))
    finally:
        lt.remove_process_set(first)


def test_a_step_with_adasum_moves_by_the_adasum_of_the_steps() -> None:
    model = torch.nn.Linear(2, 2)
    torch.nn.init.zeros_(model.weight)
    sgd = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    optimizer = lt.DistributedOptimizer(sgd, model.named_parameters(), op=lt.Adasum)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    torch.manual_seed(lt.rank())
    model(torch.randn(3, 2)).square().sum().backward()
    own = [-0.5 * parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    optimizer.step()
    for parameter, start, step in zip(model.parameters(), before, own, strict=True):
        steps = [*lt.allgather(step.unsqueeze(0))]
        while len(steps) > 1:
            pairs = [combined(*steps[n : n + 2]) if n + 1 < len(steps) else steps[n] for n in range(0, len(steps), 2)]
            steps = pairs
        torch.testing.assert_close(parameter.detach(), start + steps[0])


def combined(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Adasum of two tensors, by the definition."""
    dot = (a * b).sum()
    return (1 - dot / (2 * (a * a).sum())) * a + (1 - dot / (2 * (b * b).sum())) * b


def test_cross_rank_and_flags_describe_this_job() -> None:
    assert (lt.cross_rank(), lt.cross_size(), lt.is_homogeneous()) == (0, 1, True)
    assert lt.mpi_built()
    # Where torchrun does not start this folder's tests, mpirun does, a single rank too.
    assert lt.mpi_enabled() == ("TORCHELASTIC_RUN_ID" not in os.environ)
    assert isinstance(lt.mpi_threads_supported(), bool)
    assert not any([lt.gloo_built(), lt.gloo_enabled(), lt.ccl_built(), lt.ddl_built(), lt.rocm_built()])
    assert isinstance(lt.nccl_built(), int)
    assert issubclass(lt.MismatchError, lt.HorovodInternalError)
    assert issubclass(lt.RankLostError, lt.HorovodInternalError)
