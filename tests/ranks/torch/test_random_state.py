"""What dropout draws after a resume: checkpoints hold the states of PyTorch's random generators."""

from pathlib import Path

import pytest
import torch
from torch import nn

import lentando.torch as lt


def dropout_model(seed: int) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.5), nn.Linear(8, 1), nn.AlphaDropout(0.3))


def train(optimizer: lt.DistributedOptimizer, model: nn.Module, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.ones(3, 4) + step).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("saved_after", [1, 2, 3])  # inside a round of 2, and at its end
def test_resumed_training_with_dropout_is_bit_identical(saved_after: int, shared_path: Path) -> None:
    model = dropout_model(0)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), 0.1), model=model, period=2)
    torch.manual_seed(100 + lt.rank())  # each rank drops other units
    train(optimizer, model, saved_after)
    lt.save(shared_path, optimizer)
    train(optimizer, model, 3)

    resumed = dropout_model(1)
    again = lt.SlowMo(torch.optim.SGD(resumed.parameters(), 0.1), model=resumed, period=2)
    torch.rand(17)
    lt.load(shared_path, again)
    train(again, resumed, 3)
    for own, other in zip(model.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(own, other)


def test_generators_of_ranks_stay_apart(shared_path: Path) -> None:
    """Each rank continues with the state that it saved itself."""
    model = dropout_model(0)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), 0.1), model=model)
    torch.manual_seed(lt.rank())
    lt.save(shared_path, optimizer)
    expected = torch.rand(3)
    torch.manual_seed(5)
    lt.load(shared_path, optimizer)
    drawn = torch.rand(3)
    assert torch.equal(drawn, expected)
    everywhere = lt.allgather(drawn.reshape(1, -1))
    assert len({tuple(row.tolist()) for row in everywhere}) == lt.size()
