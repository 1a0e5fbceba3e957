"""What an outer step does to optimizer state, buffers and parameters other than the trained ones (O16)."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch_training import (
    assert_equal_on_all_ranks,
    assert_same_model,
    batches,
    everyones,
    net,
    set_gradient,
    sgd,
    train,
    train_vector,
    vector,
)

import lentando.torch as lt
from lentando.comm.transport import Transport


@pytest.mark.parametrize("base_buffers", ["reset", "maintain", "average"])
def test_base_optimizer_state_is_reset_maintained_or_averaged(base_buffers: Any) -> None:
    """O16."""
    model = net()
    for parameter in model.unused.parameters():
        parameter.requires_grad_(False)
    optimizer = lt.SlowMo(sgd(model), model=model, period=4, base_buffers=base_buffers)
    train(optimizer, model, 3)
    weight = model.out.weight
    images, labels = next(batches(1, first=3))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    local = 0.9 * optimizer.state[weight]["momentum_buffer"] + weight.grad
    optimizer.step()
    assert optimizer.report()["rounds"] == 1
    if base_buffers == "reset":
        assert not optimizer.state
    elif base_buffers == "maintain":
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], local)
    else:
        mean = torch.stack(everyones(local)).double().mean(dim=0)
        assert torch.allclose(optimizer.state[weight]["momentum_buffer"].double(), mean, atol=1e-7)
        for other in everyones(optimizer.state[weight]["momentum_buffer"]):
            assert torch.equal(other, optimizer.state[weight]["momentum_buffer"])


def test_stateless_base_optimizer_does_not_care_about_its_buffers() -> None:
    """O16."""
    outcomes = []
    for base_buffers in ("reset", "maintain", "average"):
        model = vector()
        optimizer = lt.SlowMo(sgd(model, momentum=0), period=3, base_buffers=base_buffers)
        outcomes.append(train_vector(optimizer, model, 9).copy())
    assert (outcomes[0] == outcomes[1]).all()
    assert (outcomes[0] == outcomes[2]).all()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_makes_every_optimizer_new(name: str) -> None:
    """O16: for Adam that includes the step count, so that bias correction starts again."""
    model = net()
    optimizer = lt.SlowMo(OPTIMIZERS[name](model.parameters()), model=model, period=3, base_buffers="reset")
    train(optimizer, model, 3)
    twin = copy.deepcopy(model)
    train(optimizer, model, 2, first=3)
    train(OPTIMIZERS[name](twin.parameters()), twin, 2, first=3)
    assert_same_model(model, twin)


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_averaged_buffers_are_equal_on_all_ranks_and_counters_are_left(name: str) -> None:
    """O16."""
    model = net()
    for parameter in model.unused.parameters():
        parameter.requires_grad_(False)
    optimizer = lt.SlowMo(OPTIMIZERS[name](model.parameters()), model=model, period=3, base_buffers="average")
    train(optimizer, model, 3)
    for state in optimizer.state.values():
        assert state["step"] == 3
        for value in state.values():
            for other in everyones(value):
                assert torch.equal(other, value)


def test_averaging_state_that_some_ranks_lack_is_an_error_that_names_the_parameter() -> None:
    if lt.size() == 1:
        return
    model = vector()
    optimizer = lt.SlowMo(sgd(model), model=model, period=1, base_buffers="average")
    if lt.rank() == 0:
        set_gradient(model, 0)
    with pytest.raises(lt.MismatchError, match=r"rank 0: 'weight\.momentum_buffer'.*: nothing"):
        optimizer.step()


def test_floating_point_buffers_are_averaged_at_outer_steps_and_integer_ones_left() -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model, period=3)
    train(optimizer, model, 2)
    if lt.size() > 1:
        assert not torch.equal(*everyones(model.norm.running_mean)[:2])
    images, labels = next(batches(1, first=2))
    nn.functional.cross_entropy(model(images), labels).backward()
    before = everyones(model.norm.running_var)
    optimizer.step()
    assert torch.allclose(model.norm.running_var, torch.stack(before).mean(dim=0), rtol=1e-6)
    assert_equal_on_all_ranks(model)
    assert model.norm.num_batches_tracked == 3


def test_tied_parameters_stay_tied_and_frozen_ones_stay_put() -> None:
    model = net()
    frozen = model.frozen.weight.clone()
    optimizer = lt.SlowMo(sgd(model), model=model, period=2)
    train(optimizer, model, 4)
    assert model.tied.weight is model.first.weight
    assert torch.equal(model.frozen.weight, frozen)
    assert_equal_on_all_ranks(model)


def test_47_of_48_steps_send_nothing(transport: Transport) -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model, period=48)
    silent = 0
    for step in range(96):
        before = transport.traffic.copy()
        train(optimizer, model, 1, first=step)
        silent += transport.traffic == before
    assert silent == 2 * 47
    assert optimizer.report()["rounds"] == 2
