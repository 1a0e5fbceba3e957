"""Every parameter that a wrapper trains has a name of its own, and every one that a model trains has a wrapper."""

import copy
import logging
from itertools import chain
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt


def wrap(*layers: nn.Module, **options: Any) -> Any:
    sgd = torch.optim.SGD(chain(*(layer.parameters() for layer in layers)), lr=0.1)
    named = list(chain(*(layer.named_parameters() for layer in layers)))
    return lt.SlowMo(sgd, **(options or {"named_parameters": named}))


def linear(**options: Any) -> nn.Linear:
    return nn.Linear(3, 3, bias=False, **options)


@pytest.mark.parametrize(
    "other",
    [linear(), linear(dtype=torch.float64), linear(dtype=torch.bfloat16), linear().requires_grad_(False)],
    ids=["float32", "float64", "bfloat16", "frozen"],
)
@pytest.mark.parametrize("first_is_frozen", [False, True])
def test_names_must_be_unique_whatever_the_dtype(other: nn.Module, first_is_frozen: bool) -> None:
    first = linear().requires_grad_(not first_is_frozen)
    with pytest.raises(lt.ConfigurationError, match=r"names of parameters must be unique, got \['weight'\] more than"):
        wrap(first, other)


def test_a_model_that_shares_nothing_with_the_optimizer_is_refused() -> None:
    with pytest.raises(lt.ConfigurationError, match="has none of the optimizer's parameters"):
        wrap(linear(), model=nn.Linear(4, 1))


@pytest.fixture
def warnings(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.WARNING, logger="lentando")

    def stated() -> list[str]:
        texts = [r.getMessage() for r in caplog.records if "in no wrapped optimizer" in r.getMessage()]
        assert lt.rank() == 0 or not texts
        return texts

    return stated


def step(model: nn.Module, *optimizers: Any) -> None:
    model(torch.ones(2, 4)).square().mean().backward()
    for optimizer in optimizers:
        optimizer.step()


def two_layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))


def test_parameters_of_no_wrapped_optimizer_are_named_once(warnings: Any) -> None:
    model = two_layers()
    optimizer = wrap(model[1], model=model)
    for _ in range(3):
        step(model, optimizer)
    if lt.rank() == 0:
        (text,) = warnings()
        assert text.startswith("2 trainable parameters of the model given as model=")
        assert "'0.weight', '0.bias'. Give them to the optimizer, or freeze them" in text
    assert not (lt.rank() and warnings())


def test_models_that_are_divided_or_partly_frozen_are_not_warned_of(warnings: Any) -> None:
    model = two_layers()
    optimizers = [wrap(part, model=model) for part in model]
    step(model, *optimizers)
    model = two_layers()
    model[0].requires_grad_(False)
    step(model, wrap(model[1], model=model))
    model = two_layers()
    step(model, wrap(model, model=model))
    assert not warnings()


def test_parameters_that_are_put_into_the_model_later_are_named_once(warnings: Any) -> None:
    """``load_state_dict(assign=True)`` gives the model other parameters than those that the optimizer trains."""
    model = two_layers()
    optimizer = lt.SlowMo(torch.optim.RMSprop(model.parameters(), lr=0.1), model=model, period=2)
    step(model, optimizer)
    model[1].load_state_dict(copy.deepcopy(model[1].state_dict()), assign=True)
    for _ in range(2):
        step(model, optimizer)
        with optimizer.averaged():
            pass
    stated = warnings()
    assert len(stated) == (lt.rank() == 0)
    assert all("'1.weight', '1.bias'" in text for text in stated)
