"""A layer that the program puts in another one's place, under its name, is trained as one that joins."""

from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

PERIOD = 3
METHODS: dict[str, dict[str, Any]] = {
    "AllReduce": {},
    "AllReduce, overlapped": {"base": lt.AllReduce(overlap=True)},
    "SlowMo": {"base": lt.LocalSGD(), "period": PERIOD, "outer": lt.SlowMomentum(slow_momentum=0.6)},
    "DiLoCo": {"base": lt.LocalSGD(), "period": PERIOD, "outer": lt.OuterSGD()},
    "SGP": {"base": lt.SGP(lt.StaticExponential())},
    "OSGP in rounds": {"base": lt.OSGP(staleness=2, deterministic=True), "period": PERIOD},
}


class WithHead(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Linear(4, 3)
        self.head = nn.Linear(3, 2)
        self.active = "head"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = getattr(self, self.active)(self.body(x))
        return result


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        inputs = torch.randn(6, 4, generator=torch.Generator().manual_seed(100 * lt.rank() + step))
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def replaced(method: str, name: str, outputs: int, steps_before: int) -> tuple[WithHead, Any]:
    """A model whose head another one replaces, which each rank begins with its own values, called ``name``."""
    model = WithHead()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5)
    optimizer = lt.DistributedOptimizer(sgd, model=model, base_buffers="maintain", **METHODS[method])
    train(model, optimizer, range(steps_before))
    for parameter in model.head.parameters():
        sgd.state.pop(parameter, None)
    torch.manual_seed(10 + lt.rank())
    setattr(model, name, nn.Linear(3, outputs))
    model.active = name
    del sgd.param_groups[0]["params"][2:]
    optimizer.add_param_group({"params": list(getattr(model, name).parameters())})
    return model, optimizer


@pytest.mark.parametrize("outputs", [2, 5])
@pytest.mark.parametrize("method", METHODS)
def test_a_replaced_layer_trains_as_one_of_another_name(method: str, outputs: int) -> None:
    found = []
    for name in ("head", "other"):
        model, optimizer = replaced(method, name, outputs, steps_before=PERIOD + 1)
        train(model, optimizer, range(PERIOD + 1, 4 * PERIOD))
        found.append([parameter.detach().clone() for parameter in getattr(model, name).parameters()])
        if method != "SGP":
            own = torch.cat([parameter.detach().reshape(1, -1) for parameter in getattr(model, name).parameters()], 1)
            everyone = lt.allgather(own)
            assert (everyone == everyone[0]).all()
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_layer_that_is_replaced_on_one_rank_alone_is_an_error_on_every_rank() -> None:
    model = WithHead()
    sgd = torch.optim.RMSprop(model.parameters(), lr=0.05)
    optimizer = lt.DistributedOptimizer(sgd, model=model)
    train(model, optimizer, range(2))
    if lt.rank() == 0:
        model.head = nn.Linear(3, 2)
        sgd.param_groups[0]["params"][2:] = list(model.head.parameters())
    if lt.size() == 1:
        train(model, optimizer, range(2, 4))
        return
    with pytest.raises(lt.MismatchError):
        train(model, optimizer, range(2, 4))
