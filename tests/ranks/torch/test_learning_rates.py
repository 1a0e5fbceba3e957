"""Learning-rate schedules drive the base optimizer and the outer step (O19, O23)."""

import pytest
import reference
import torch
from numpy.testing import assert_allclose
from torch_training import QUADRATIC, START, assert_equal_on_all_ranks, net, set_gradient, sgd, train, vector

import lentando.torch as lt


def test_scheduler_on_either_optimizer_drives_both() -> None:
    """O23: the parameter groups are the same list."""
    for attach_to_wrapper in (True, False):
        model = net()
        base = sgd(model, lr=0.8)
        optimizer = lt.SlowMo(base, model=model, period=2)
        assert optimizer.param_groups is base.param_groups
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer if attach_to_wrapper else base, step_size=1, gamma=0.5)
        for step in range(3):
            train(optimizer, model, 1, first=step)
            scheduler.step()
        assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_learning_rate_that_changes_within_a_round_counts_as_its_mean() -> None:
    model = vector()
    optimizer = lt.SlowMo(sgd(model, lr=0.4, momentum=0), period=4, slow_momentum=0.6)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(12):
        set_gradient(model, step)
        optimizer.step()
        scheduler.step()
    expected = reference.slowmo(lt.size(), 12, START, QUADRATIC, 4, lambda step: 0.4 * 0.9**step, beta=0.6)
    assert_allclose(model.weight.detach().numpy()[0], expected.x[lt.rank()], rtol=1e-10)


def test_learning_rate_0_keeps_the_model_finite() -> None:
    """O19: as in the first step of a warm-up."""
    model = net()
    optimizer = lt.SlowMo(sgd(model, lr=0.0), model=model, period=2)
    train(optimizer, model, 4)
    optimizer.param_groups[0]["lr"] = 0.05
    train(optimizer, model, 4, first=4)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert_equal_on_all_ranks(model)
