"""Training with PyTorch computes what the NumPy reference and PyTorch's own optimizers compute (O2, O3, O7)."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose
from torch import nn
from torch_training import DIMENSION, QUADRATIC, START, sgd, train_vector, vector

import lentando.torch as lt
from lentando.optimizers.rules.slow_momentum import SlowMomentum


@pytest.mark.parametrize("nesterov", [False, True])
def test_slowmo_in_torch_equals_algorithm_1(nesterov: bool) -> None:
    model = vector()
    optimizer = lt.SlowMo(
        sgd(model, lr=0.1, momentum=0.5),
        period=4,
        slow_lr=0.8,
        slow_momentum=0.6,
        nesterov=nesterov,
        base_buffers="reset",
    )
    x = train_vector(optimizer, model, 22)
    expected = reference.slowmo(
        lt.size(), 22, START, QUADRATIC, 4, lambda _: 0.1, 0.8, 0.6, 0.5, buffers="reset", nesterov=nesterov
    )
    assert_allclose(x, expected.x[lt.rank()], rtol=1e-12, atol=1e-12)


def test_period_1_is_torchs_momentum_sgd_on_the_averaged_gradient() -> None:
    """O2: with torch's own SGD(momentum, dampening=0, nesterov=False) for comparison."""
    slow, synchronous = vector(), vector()
    train_vector(lt.SlowMo(sgd(slow, lr=0.1, momentum=0), period=1, slow_momentum=0.7), slow, 20)
    train_vector(lt.DistributedOptimizer(sgd(synchronous, lr=0.1, momentum=0.7)), synchronous, 20)
    assert_allclose(slow.weight.detach().numpy(), synchronous.weight.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("algorithm", ["ring", "backend"])
def test_allreduce_is_sgd_on_the_averaged_gradient(algorithm: Any) -> None:
    """O3's other side."""
    model = vector()
    optimizer = lt.DistributedOptimizer(sgd(model, lr=0.1, momentum=0.7), base=lt.AllReduce(algorithm))
    expected = reference.synchronous_sgd(lt.size(), 20, START, QUADRATIC, 0.1, momentum=0.7)
    assert_allclose(train_vector(optimizer, model, 20), expected, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_slow_step_is_torchs_sgd_on_the_pseudo_gradient(nesterov: bool, dtype: Any) -> None:
    """O7, and O66 for nesterov: for a constant learning rate, torch.optim.SGD(lr=alpha, momentum=beta)."""
    anchor = START.astype(dtype)
    weights = nn.Parameter(torch.from_numpy(anchor.copy()))
    outer = torch.optim.SGD([weights], lr=0.7, momentum=0.9, nesterov=nesterov)
    rule, slow = SlowMomentum(0.7, 0.9, nesterov), np.zeros(DIMENSION, dtype)
    for t in range(8):
        mean = anchor + np.random.default_rng(t).normal(size=DIMENSION).astype(dtype)
        weights.grad = weights.detach() - torch.from_numpy(mean)
        outer.step()
        rule.step(anchor, slow, mean, learning_rate=0.05)
        assert_allclose(anchor, weights.detach().numpy(), rtol=5e-5 if dtype == np.float32 else 1e-12, atol=1e-6)


def test_gradients_of_several_batches_accumulate_into_one_inner_step() -> None:
    model = vector()
    optimizer = lt.SlowMo(sgd(model, lr=0.1, momentum=0), period=2, slow_momentum=0.5)
    for step in range(6):
        optimizer.zero_grad()
        for _ in range(3):
            (model.weight * torch.from_numpy(QUADRATIC(lt.rank(), step, START)) / 3).sum().backward()
        optimizer.step()
    expected = reference.slowmo(lt.size(), 6, START, lambda i, k, x: QUADRATIC(i, k, START), 2, lambda _: 0.1, beta=0.5)
    assert optimizer.report()["rounds"] == 3
    assert_allclose(model.weight.detach().numpy()[0], expected.x[lt.rank()], rtol=1e-12)


def test_groups_step_outward_by_their_own_learning_rates() -> None:
    def outcome(rates: list[float], factor: float) -> torch.Tensor:
        model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in rates])
        groups = [{"params": [p], "lr": lr} for p, lr in zip(model, rates, strict=True)]
        optimizer = lt.SlowMo(torch.optim.SGD(groups, lr=9.0), period=2, slow_momentum=0.5)
        for step in range(8):
            for number, parameter in enumerate(model):
                parameter.grad = torch.full_like(parameter, float(step + number + 1))
            if step == 4:
                for group in optimizer.param_groups:
                    group["lr"] *= factor
            optimizer.step()
        return torch.stack(list(model)).detach()

    assert torch.allclose(outcome([0.1, 0.2], 0.5)[0], outcome([0.1, 7.0], 0.5)[0])
    assert torch.allclose(outcome([0.1, 0.2], 0.5)[1], outcome([3.0, 0.2], 0.5)[1])
