"""``lt.DiLoCo`` against an outer ``torch.optim.SGD`` written by hand, with schedules inside."""

import copy
import math
from typing import Any

import pytest
import torch

import lentando.torch as lt
from lentando.comm import world

PERIOD, ROUNDS = 5, 6


def loss_of(net: torch.nn.Module, rank: int, step: int) -> torch.Tensor:
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * step + rank), dtype=torch.float64)
    return (net(x) - x.sum(1, keepdim=True)).square().mean()


def by_hand(start: torch.nn.Module, inner: Any, schedule: Any, outer_settings: dict[str, Any]) -> list[torch.Tensor]:
    """All workers of the job in one process."""
    replicas = [copy.deepcopy(start) for _ in range(lt.size())]
    optimizers = [inner(replica) for replica in replicas]
    schedules = [schedule(optimizer) for optimizer in optimizers]
    anchor = [p.detach().clone().requires_grad_() for p in start.parameters()]
    outer = torch.optim.SGD(anchor, **outer_settings)
    for step in range(PERIOD * ROUNDS):
        for rank, (net, optimizer) in enumerate(zip(replicas, optimizers, strict=True)):
            optimizer.zero_grad()
            loss_of(net, rank, step).backward()
            optimizer.step()
            schedules[rank].step()
        if (step + 1) % PERIOD == 0:
            averages = [
                torch.stack([p.detach() for p in same]).mean(0)
                for same in zip(*map(list, map(torch.nn.Module.parameters, replicas)), strict=True)
            ]
            for own, average in zip(anchor, averages, strict=True):
                own.grad = own.detach() - average
            outer.step()
            with torch.no_grad():
                for replica in replicas:
                    for parameter, own in zip(replica.parameters(), anchor, strict=True):
                        parameter.copy_(own)
    return [own.detach() for own in anchor]


def adamw(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(net.parameters(), lr=0.05, weight_decay=0.1)


def momentum_sgd(net: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.02, momentum=0.9)


def cosine(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, PERIOD * ROUNDS)


def warm_up(optimizer: torch.optim.Optimizer) -> Any:
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, step / 7) * math.exp(-step / 20))


@pytest.mark.parametrize(
    ("inner", "schedule", "outer"),
    [
        (adamw, cosine, {"lr": 0.7, "momentum": 0.9, "nesterov": True}),
        (adamw, warm_up, {"lr": 0.7, "momentum": 0.5, "nesterov": False}),
        (momentum_sgd, cosine, {"lr": 0.5, "momentum": 0.0, "nesterov": False}),
    ],
)
def test_outer_step_is_that_of_torch_sgd_under_a_schedule(inner: Any, schedule: Any, outer: dict[str, Any]) -> None:
    torch.manual_seed(0)
    net = torch.nn.Linear(4, 1).double()
    expected = by_hand(net, inner, schedule, outer)
    optimizer = lt.DiLoCo(
        inner(net),
        model=net,
        period=PERIOD,
        outer_lr=outer["lr"],
        outer_momentum=outer["momentum"],
        nesterov=outer["nesterov"],
    )
    scheduler = schedule(optimizer)
    for step in range(PERIOD * ROUNDS):
        optimizer.zero_grad()
        loss_of(net, lt.rank(), step).backward()
        optimizer.step()
        scheduler.step()
    for parameter, other in zip(net.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.detach(), other, rtol=1e-12, atol=1e-12)


def test_defaults_are_the_papers() -> None:
    net = torch.nn.Linear(4, 1)
    settings = lt.DiLoCo(adamw(net), model=net).training().replica.settings
    assert settings.outer == lt.OuterSGD(0.7, 0.9, nesterov=True)
    assert settings.period == 500
    assert settings.base_buffers == "maintain"
    assert not settings.base.communicates
    assert world.is_initialized()
