"""Losses that users give with a step, and that are not one number."""

from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

METHODS: dict[str, dict[str, Any]] = {"allreduce": {}, "local sgd": {"base": lt.LocalSGD(), "period": 2}}


@pytest.mark.parametrize("loss", [torch.ones(8), torch.ones(2, 1), torch.ones(0), [1.0, 2.0], "low"])
@pytest.mark.parametrize("method", ["allreduce", "local sgd"])
def test_loss_of_several_numbers_is_refused_with_its_shape(loss: Any, method: str) -> None:
    model = nn.Linear(3, 1)
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, **METHODS[method])
    shape = str(tuple(loss.shape) if isinstance(loss, torch.Tensor) else (2,)).replace("(", r"\(").replace(")", r"\)")
    found = "str 'low'" if loss == "low" else f"shape {shape}"
    with pytest.raises(lt.ConfigurationError, match=f"loss= must be one number.*got {found}"):
        optimizer.step(loss=loss)
    optimizer.step(loss=torch.ones(1))


def test_closure_whose_loss_has_several_numbers_is_refused() -> None:
    model = nn.Linear(3, 1)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=2)
    with pytest.raises(lt.ConfigurationError, match=r"got shape \(4,\)"):
        optimizer.step(lambda: torch.ones(4))


@pytest.mark.parametrize("has_closure", [False, True])
def test_a_step_that_is_not_taken_leaves_no_loss_behind(has_closure: bool) -> None:
    model = nn.Linear(3, 1)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = lt.AdaComm(sgd, model=model, base=lt.AllReduce(), initial_period=2, interval_steps=2)

    def backward(scale: float) -> torch.Tensor:
        optimizer.zero_grad()
        loss = model(torch.ones(2, 3)).square().mean()
        (scale * loss).backward()
        return loss

    def step(scale: float) -> None:
        optimizer.step(lambda: backward(scale)) if has_closure else optimizer.step(loss=backward(scale))

    step(1.0)
    with pytest.raises(lt.NonFiniteError, match="the step is not taken"):
        step(float("nan"))
    for _ in range(3):
        step(1.0)
    assert (optimizer.report()["inner_steps"], optimizer.report()["rounds"]) == (4, 2)
