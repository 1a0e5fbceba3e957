"""Gradients that are missing, zeroed in place or averaged before the step (O22)."""

import pytest
import reference
import torch
from numpy.testing import assert_allclose
from torch import nn
from torch_training import (
    QUADRATIC,
    START,
    assert_equal_on_all_ranks,
    batches,
    net,
    set_gradient,
    sgd,
    train,
    train_vector,
    vector,
)

import lentando.torch as lt


def test_parameter_without_gradient_on_one_rank_is_averaged_all_the_same() -> None:
    """O22: no hang; equal on all ranks afterwards."""
    for base in (lt.LocalSGD(), lt.AllReduce()):
        model = net()
        optimizer = lt.DistributedOptimizer(sgd(model), model=model, base=base, period=2)
        for step, (images, labels) in enumerate(batches(4)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            if lt.rank() == 0 and step % 2:
                loss = loss + model.unused(torch.ones(3)).sum()
            loss.backward()
            optimizer.step()
        assert_equal_on_all_ranks(model)


def test_allreduce_leaves_parameters_that_no_rank_used_without_gradient() -> None:
    model = net()
    optimizer = lt.DistributedOptimizer(sgd(model, weight_decay=0.1), model=model)
    before = model.unused.weight.clone()
    train(optimizer, model, 3)
    assert model.unused.weight.grad is None
    assert torch.equal(model.unused.weight, before)


def test_allreduce_counts_a_missing_gradient_as_zero() -> None:
    model = vector()
    optimizer = lt.DistributedOptimizer(sgd(model, lr=1.0, momentum=0))
    if lt.rank() == 0:
        model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert_allclose(model.weight.detach().numpy()[0], START - 1 / lt.size())


def test_gradients_zeroed_in_place_are_averaged_without_a_copy() -> None:
    model = vector()
    optimizer = lt.DistributedOptimizer(sgd(model, lr=0.1, momentum=0))
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        home = None if model.weight.grad is None else model.weight.grad.data_ptr()
        (model.weight * torch.from_numpy(QUADRATIC(lt.rank(), step, START))).sum().backward()
        optimizer.step()
        assert model.weight.grad is not None
        assert home is None or home == model.weight.grad.data_ptr()
    expected = reference.synchronous_sgd(lt.size(), 3, START, lambda i, k, x: QUADRATIC(i, k, START), 0.1)
    assert_allclose(model.weight.detach().numpy()[0], expected)


@pytest.mark.parametrize("case", ["dense", "transposed", "one in flat memory", "one missing", "with a graph"])
def test_gradients_are_gathered_wherever_they_are(case: str) -> None:
    """At once where all are dense tensors of their own, otherwise one by one."""
    model = nn.ParameterList([torch.zeros(3, 4), torch.zeros(2), torch.zeros(5, 2)])
    optimizer = lt.DistributedOptimizer(sgd(model, lr=1.0, momentum=0))
    for step in range(2):
        values = [torch.arange(p.numel()).view(p.shape) + float(lt.rank() + step) for p in model]
        for number, (parameter, value) in enumerate(zip(model, values, strict=True)):
            if case == "transposed":
                value = value.t().contiguous().t()  # noqa: PLW2901 - the same values in another order
            if case == "one missing" and number == 1:
                parameter.grad = None
            elif case == "one in flat memory" and step and number == 1:
                assert parameter.grad is not None
                parameter.grad.copy_(value)
            else:
                parameter.grad = value.requires_grad_() * 1 if case == "with a graph" else value
        optimizer.step()
    for number, parameter in enumerate(model):
        mean = (lt.size() - 1) / 2
        expected = -2 * (torch.arange(parameter.numel()).view(parameter.shape) + mean + 0.5)
        missing = case == "one missing" and number == 1
        assert torch.equal(parameter.detach(), torch.zeros_like(expected) if missing else expected)


def test_synchronize_averages_once_so_that_gradients_can_be_clipped() -> None:
    clipped, plain = vector(), vector()
    one = lt.DistributedOptimizer(sgd(clipped, lr=0.1, momentum=0))
    other = lt.DistributedOptimizer(sgd(plain, lr=0.1, momentum=0))
    for step in range(4):
        set_gradient(clipped, step)
        one.synchronize()
        torch.nn.utils.clip_grad_norm_(clipped.parameters(), 1e9)
        with one.skip_synchronize():
            one.step()
    train_vector(other, plain, 4)
    assert torch.equal(clipped.weight, plain.weight)
    assert one.report()["inner_steps"] == 4
