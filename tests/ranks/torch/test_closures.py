"""Optimizers whose `step` takes a closure."""

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
