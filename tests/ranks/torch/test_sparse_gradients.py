"""Sparse gradients of embeddings are averaged by gathering their rows, or like dense ones."""

from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt


def embedding() -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(6, 3, sparse=True)


def rows_of(rank: int) -> list[int]:
    """Rows that a rank uses; some of them twice, some on several ranks."""
    return [0, 0, (rank + 1) % 6, 4]


def dense_average(used: dict[int, list[int]]) -> torch.Tensor:
    total = torch.zeros(6, 3)
    for rank, rows in used.items():
        for row in rows:
            total[row] += rank + 1
    return total / lt.size()


def backward(model: nn.Embedding, rows: list[int]) -> None:
    (model(torch.tensor(rows)) * (lt.rank() + 1)).sum().backward()


@pytest.mark.parametrize("sparse_as_dense", [False, True])
@pytest.mark.parametrize("op", [lt.Average, lt.Sum])
def test_a_step_uses_the_average_of_all_ranks(sparse_as_dense: bool, op: Any) -> None:
    model = embedding()
    before = model.weight.detach().clone()
    sgd = torch.optim.SGD(model.parameters(), lr=0.5)
    optimizer = lt.DistributedOptimizer(sgd, op=op, sparse_as_dense=sparse_as_dense, model=model)
    backward(model, rows_of(lt.rank()))
    optimizer.step()
    expected = dense_average({rank: rows_of(rank) for rank in range(lt.size())})
    if op is lt.Sum:
        expected *= lt.size()
    assert model.weight.grad is not None
    assert model.weight.grad.is_sparse
    torch.testing.assert_close(model.weight.grad.to_dense(), expected)
    torch.testing.assert_close(model.weight.detach(), before - 0.5 * expected)


@pytest.mark.parametrize("sparse_as_dense", [False, True])
def test_ranks_without_a_gradient_count_as_zeros(sparse_as_dense: bool) -> None:
    model = embedding()
    optimizer = lt.DistributedOptimizer(
        torch.optim.SparseAdam(list(model.parameters()), lr=0.5), sparse_as_dense=sparse_as_dense, model=model
    )
    if lt.rank() == 0:
        backward(model, [2])
    optimizer.step()
    assert model.weight.grad is not None
    torch.testing.assert_close(model.weight.grad.to_dense(), dense_average({0: [2]}))
    weights = lt.allgather(model.weight.detach().unsqueeze(0))
    assert (weights == weights[0]).all()
    assert not torch.equal(model.weight[2], embedding().weight[2])
    assert torch.equal(model.weight[1], embedding().weight[1])


def test_dense_and_sparse_gradients_of_one_model() -> None:
    model = nn.Sequential(embedding(), nn.Linear(3, 1))
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), model=model)
    model(torch.tensor(rows_of(lt.rank()))).sum().backward()
    own = [parameter.grad.to_dense() for parameter in model.parameters()]  # type: ignore[union-attr]
    optimizer.synchronize()
    for parameter, gradient in zip(model.parameters(), own, strict=True):
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad.to_dense(), lt.allreduce(gradient))
    with optimizer.skip_synchronize():
        optimizer.step()


def test_values_that_are_not_finite_are_an_error_on_every_rank() -> None:
    model = embedding()
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), model=model)
    (model(torch.tensor([1])) * (float("nan") if lt.rank() == lt.size() - 1 else 1.0)).sum().backward()
    with pytest.raises(lt.NonFiniteError, match="sparse gradient of 'weight'"):
        optimizer.step()


def test_join_needs_dense_gradients() -> None:
    model = embedding()
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5), on_nonfinite="skip", model=model)
    backward(model, [1])
    with pytest.raises(lt.ConfigurationError, match="sparse_as_dense=True"):
        optimizer.step()
