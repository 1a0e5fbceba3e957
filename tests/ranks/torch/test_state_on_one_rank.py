"""A base optimizer that has state on one rank alone when it is wrapped: a warning, for a broadcast may follow."""

import logging
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

OPTIMIZERS: dict[str, tuple[Callable[[Iterable[Any]], torch.optim.Optimizer], str, str]] = {
    "adam": (lambda p: torch.optim.Adam(p, lr=0.1), "no state", "state for 2 parameters, at step 1"),
    "sgd, momentum": (lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9), "no state", "state for 2 parameters"),
    "adagrad": (
        lambda p: torch.optim.Adagrad(p, lr=0.1),
        "state for 2 parameters, at step 0",
        "state for 2 parameters, at step 1",
    ),
}
METHODS: dict[str, dict[str, Any]] = {
    "allreduce": {"base": lt.AllReduce()},
    "local sgd": {"base": lt.LocalSGD(), "period": 2},
    "sgp": {"base": lt.SGP()},
}


def take_step(optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
    optimizer.zero_grad()
    model(torch.full((2, 4), 1.0 + lt.rank())).square().mean().backward()
    optimizer.step()


def warned(log: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in log.records if "different state" in record.getMessage()]


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("method", METHODS)
def test_state_on_one_rank_alone_is_warned_of_once(name: str, method: str, caplog: pytest.LogCaptureFixture) -> None:
    make, without, having = OPTIMIZERS[name]
    model = nn.Linear(4, 1)
    base = make(model.parameters())
    if lt.rank() == 0:
        take_step(base, model)
    optimizer = lt.DistributedOptimizer(base, model=model, **METHODS[method])
    for _ in range(3):
        take_step(optimizer, model)
    others = {2: "rank 1", 3: "ranks 1 and 2"}.get(lt.size(), "ranks")
    if lt.size() == 1 or lt.rank() != 0:
        assert not warned(caplog)
    else:
        (text,) = warned(caplog)
        assert f"rank 0: {having}; {others}" in text
        assert f": {without}. Unless" in text
        assert "broadcast_optimizer_state" in text


def test_a_broadcast_after_the_warning_makes_replicas_equal() -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    base = torch.optim.Adam(model.parameters(), lr=0.1)
    if lt.rank() == 0:
        take_step(base, model)
    optimizer = lt.DistributedOptimizer(base, model=model)
    lt.broadcast_optimizer_state(optimizer, 0)
    for _ in range(3):
        take_step(optimizer, model)
    everyone = lt.allgather(model.weight.detach())
    assert (everyone == everyone[0]).all()


def test_equal_state_on_all_ranks_is_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.WARNING)
    for make, _, _ in OPTIMIZERS.values():
        model = nn.Linear(4, 1)
        base = make(model.parameters())
        take_step(base, model)
        lt.DistributedOptimizer(base, model=model)
    assert not warned(caplog)
