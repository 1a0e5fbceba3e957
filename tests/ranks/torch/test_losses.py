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
