"""``torch.nn.Embedding(max_norm=...)`` changes its weights in the forward pass, on each rank by its own batch."""

from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

METHODS: dict[str, dict[str, Any]] = {
    "allreduce": {"base": lt.AllReduce()},
    "local sgd": {"base": lt.LocalSGD(), "period": 2},
    "slowmo": {"base": lt.LocalSGD(), "period": 2, "outer": lt.SlowMomentum()},
}


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(60, 8, max_norm=1.0), nn.Linear(8, 1))


def train(model: nn.Module, method: str, steps: int) -> None:
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model=model, **METHODS[method])
    for step in range(steps):
        optimizer.zero_grad()
        torch.manual_seed(10 * step + lt.rank())
        loss = model(torch.randint(60, (8,))).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


@pytest.mark.parametrize("method", METHODS)
def test_rows_above_the_bound_are_an_error_that_names_the_cause(method: str) -> None:
    if lt.size() == 1:
        return
    with pytest.raises(lt.MismatchError, match=r"first forward pass changed them in place, .*max_norm"):
        train(make_model(), method, 4)


@pytest.mark.parametrize("method", ["local sgd", "slowmo"])
def test_rows_below_the_bound_train(method: str) -> None:
    model = make_model()
    with torch.no_grad():
        model[0].weight.copy_(torch.renorm(model[0].weight, 2, 0, 0.999))
    train(model, method, 4)
    everyone = lt.allgather(model[0].weight.detach()[None])
    assert (everyone == everyone[0]).all()
