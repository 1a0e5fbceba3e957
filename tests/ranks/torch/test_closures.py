"""Optimizers whose `step` takes a closure."""

import pytest
import torch
from numpy.testing import assert_allclose
from torch_training import DIMENSION, assert_equal_on_all_ranks, set_gradient, sgd, vector

import lentando.torch as lt


def test_closure_of_lbfgs_sees_the_mean_loss_and_gradient() -> None:
    """Every rank takes the same decisions in the line search, and reaches the minimum of the mean loss."""
    model = vector()
    optimizer = lt.DistributedOptimizer(torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"))
    centre = torch.full((1, DIMENSION), float(lt.rank()), dtype=torch.float64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model.weight - centre).square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert_allclose(model.weight.detach().numpy(), (lt.size() - 1) / 2, atol=1e-6)
    assert_equal_on_all_ranks(model)


def test_closure_with_local_steps() -> None:
    model, twin = vector(), vector()
    optimizer = lt.SlowMo(sgd(model, momentum=0), period=2)
    other = lt.SlowMo(sgd(twin, momentum=0), period=2)
    for step in range(4):

        def closure(step: int = step) -> float:
            set_gradient(model, step)
            return 1.5

        assert optimizer.step(closure) == 1.5
        set_gradient(twin, step)
        other.step()
    assert torch.equal(model.weight, twin.weight)


def test_closure_that_averages_gradients_clips_the_average() -> None:
    """The gradients are averaged once, by synchronize() in the closure, and step() takes them as they were left."""
    model = vector()
    optimizer = lt.DistributedOptimizer(sgd(model, momentum=0))
    rate = optimizer.param_groups[0]["lr"]
    expected = model.weight.detach().clone()
    for step in range(1, 4):

        def closure(step: int = step) -> float:
            model.weight.grad = torch.full_like(model.weight, float(step * (1 + lt.rank())))
            loss = optimizer.synchronize(loss=float(lt.rank()))
            torch.nn.utils.clip_grad_value_([model.weight], 2.0)
            return loss

        assert optimizer.step(closure) == (lt.size() - 1) / 2
        expected -= rate * min(2.0, step * (lt.size() + 1) / 2)
        assert_allclose(model.weight.detach().numpy(), expected.numpy(), rtol=1e-12)
        assert optimizer.report()["inner_steps"] == step
    once = lt.DistributedOptimizer(sgd(model, momentum=0))
    for _ in range(3):
        model.weight.grad = torch.zeros_like(model.weight)
        once.step()
    assert optimizer.report()["messages"] == once.report()["messages"]  # the closure's averages are the only ones


def test_nan_that_a_closure_averages_is_an_error_before_the_step() -> None:
    model = vector()
    optimizer = lt.DistributedOptimizer(sgd(model, momentum=0))
    before = model.weight.detach().clone()

    def closure() -> None:
        model.weight.grad = torch.full_like(model.weight, float("nan") if lt.rank() == 0 else 1.0)
        optimizer.synchronize()

    with pytest.raises(lt.NonFiniteError, match="rank 0"):
        optimizer.step(closure)
    assert torch.equal(model.weight, before)
