"""Base optimizers without a learning rate: no "lr" in their groups, or None (Adafactor's relative step)."""

from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt


class Own(torch.optim.Optimizer):
    """Steps at a rate of its own."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.data.add_(parameter.grad, alpha=-0.1)


DEFAULTS: list[dict[str, Any]] = [{}, {"lr": None}]
NEED_NO_RATE: dict[str, dict[str, Any]] = {
    "allreduce": {},
    "allreduce and outer steps": {"period": 2},
    "local sgd": {"base": lt.LocalSGD(), "period": 2},
    "sgp": {"base": lt.SGP()},
    "osgp": {"base": lt.OSGP(), "period": 2},
    "lookahead": {"base": lt.LocalSGD(), "period": 2, "outer": lt.SlowMomentum(0.5, 0.0)},
    "diloco": {"base": lt.LocalSGD(), "period": 2, "outer": lt.OuterSGD()},
    "post-local": {"base": lt.LocalSGD(), "period": lt.PostLocal(2, 3)},
}


def batch(step: int) -> torch.Tensor:
    return torch.full((2, 3), 1.0 + lt.rank() + step)


def train(wrapped: torch.optim.Optimizer, model: nn.Module, steps: int = 4, **settings: Any) -> lt.DistributedOptimizer:
    optimizer = lt.DistributedOptimizer(wrapped, model=model, **settings)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(batch(step)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return optimizer


@pytest.mark.parametrize("defaults", DEFAULTS)
@pytest.mark.parametrize("method", NEED_NO_RATE)
def test_methods_that_need_no_rate_train_as_with_one(method: str, defaults: dict[str, Any]) -> None:
    own, sgd = nn.Linear(3, 1), nn.Linear(3, 1)
    sgd.load_state_dict(own.state_dict())
    train(Own(own.parameters(), defaults), own, **NEED_NO_RATE[method])
    train(torch.optim.SGD(sgd.parameters(), lr=0.1), sgd, **NEED_NO_RATE[method])
    for one, other in zip(own.parameters(), sgd.parameters(), strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize(
    ("settings", "stated"),
    [
        (
            {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(), "period": 2},
            r"SlowMomentum\(.*\) needs the",
        ),
        ({"outer": lt.SlowMomentum(1.0, 0.3), "period": lt.PostLocal(1, 2)}, r"SlowMomentum\(.*\) needs the"),
        ({"base": lt.LocalSGD(), "period": lt.AdaptivePeriod()}, r"AdaptivePeriod\(.*\) follows the"),
        (
            {"base": lt.SGP(), "period": lt.PostLocal(3, lt.AdaptivePeriod())},
            r"PostLocal\(.*\) follows the",
        ),
    ],
)
@pytest.mark.parametrize("defaults", DEFAULTS)
def test_methods_that_need_one_say_so_at_construction(settings: Any, stated: str, defaults: dict[str, Any]) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 1))
    groups = [{"params": model[0].parameters(), "lr": 0.1}, {"params": model[1].parameters()}]
    with pytest.raises(
        lt.ConfigurationError, match=rf"{stated} learning rate.*group 1 of the base optimizer has none.*Use "
    ):
        lt.DistributedOptimizer(Own(groups, defaults), model=model, **settings)


@pytest.mark.parametrize("defaults", DEFAULTS)
def test_adafactor_with_a_relative_step_resumes(defaults: dict[str, Any], shared_path: Any) -> None:
    model = nn.Linear(3, 1)
    optimizer = train(Own(model.parameters(), defaults), model, 3, base=lt.LocalSGD(), period=2)
    lt.save(shared_path, optimizer)
    lt.load(shared_path, optimizer)
    assert optimizer.report()["inner_steps"] == 3


def test_ranks_without_batches_step_along_without_a_rate() -> None:
    model = nn.Linear(3, 1)
    optimizer = lt.DistributedOptimizer(Own(model.parameters(), {"lr": None}), model=model)
    with lt.join(optimizer):
        for step in range(2 + lt.rank()):
            optimizer.zero_grad()
            model(batch(step)).square().mean().backward()
            optimizer.step()
    mine = torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
    assert all(torch.equal(mine, torch.tensor(other)) for other in lt.allgather_object(mine.tolist()))
    assert optimizer.param_groups[0]["lr"] is None
