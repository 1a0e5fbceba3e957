"""Rounds in which the ranks take unequally many steps, in PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose
from torch_training import QUADRATIC, START, net, set_gradient, sgd, train, vector

import lentando.torch as lt

RATE = 0.05


def steps_of(size: int) -> list[int]:
    return [4 - rank % 3 for rank in range(size)]


@pytest.mark.parametrize("weighting", ["steps", "normalized"])
def test_slowmo_equals_the_reference(weighting: Any) -> None:
    """Gradients are numbered by the replica's steps, which jump at the end of a round."""
    steps, model = steps_of(lt.size()), vector()
    period = lt.StepsByRank(steps)
    plain = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer = lt.SlowMo(plain, model=model, period=period, slow_momentum=0.6, weighting=weighting)
    assert optimizer.period == steps[lt.rank()]
    while optimizer.rounds < 3:
        set_gradient(model, optimizer.report()["inner_steps"])
        optimizer.step()
    expected = reference.unequal_slowmo(3, START, QUADRATIC, lambda number: steps, RATE, 1.0, 0.6, weighting)
    assert_allclose(model.weight.detach().numpy()[0], expected, rtol=0, atol=1e-13)


def trained(rounds: int, seed: int = 0) -> tuple[lt.DistributedOptimizer, torch.nn.Module]:
    model = net(seed)
    period = lt.RoundSeconds(0.02, initial_steps=2, measured_rounds=2)
    optimizer = lt.SlowMo(sgd(model), model=model, period=period, slow_momentum=0.5, weighting="steps")
    train_until(optimizer, model, rounds)
    return optimizer, model


def train_until(optimizer: lt.DistributedOptimizer, model: torch.nn.Module, rounds: int) -> None:
    """Train until so many rounds, on batches that are numbered by the replica's steps."""
    while optimizer.rounds < rounds:
        train(optimizer, model, 1, optimizer.report()["inner_steps"])


def test_a_checkpoint_continues_bit_identically(shared_path: Path) -> None:
    """Of the end of a round, after the rounds that are measured."""
    optimizer, model = trained(3)
    lt.save(shared_path / "it", optimizer)
    train_until(optimizer, model, 5)
    again, resumed = trained(0, seed=7)
    lt.load(shared_path / "it", again)
    assert again.period == optimizer.period
    train_until(again, resumed, 5)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name
    schedule = again.schedule
    assert isinstance(schedule, lt.RoundSeconds)
    assert lt.allgather_object(schedule.steps_by_rank) == [schedule.steps_by_rank] * lt.size()


def test_the_report_proposes_numbers_of_steps() -> None:
    optimizer, _ = trained(3)
    report = optimizer.report()
    proposed = report["equalising_steps"]
    times = np.multiply(proposed, report["compute_seconds_by_rank"])
    assert len(proposed) == lt.size()
    assert times.max() - times.min() <= 1.001 * max(report["compute_seconds_by_rank"])
