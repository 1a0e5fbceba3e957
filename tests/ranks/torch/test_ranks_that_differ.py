"""Ranks that wrap other base optimizers, or whose learning rates come apart: an error or a warning."""

import logging
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

METHODS: dict[str, Callable[..., lt.DistributedOptimizer]] = {
    "allreduce": lt.DistributedOptimizer,
    "slowmo": lambda base, **o: lt.SlowMo(base, period=2, **o),
    "sgp": lambda base, **o: lt.DistributedOptimizer(base, base=lt.SGP(), **o),
    "osgp, slowmo": lambda base, **o: lt.SlowMo(base, base=lt.OSGP(), period=2, **o),
    "local sgd": lambda base, **o: lt.DistributedOptimizer(base, base=lt.LocalSGD(), period=2, **o),
    "diloco": lambda base, **o: lt.DiLoCo(base, period=2, **o),
}


def is_last() -> bool:
    """Whether this rank is the one that differs: none does in a world of 1."""
    return lt.rank() == lt.size() - 1 > 0


def refused(stated: str) -> Any:
    return pytest.raises(lt.MismatchError, match=stated) if lt.size() > 1 else nullcontext()


def ranks(of: str, last: str) -> str:
    """``others: of; rank n: last`` as an error says it."""
    others = {2: "rank 0", 3: "ranks 0 and 1"}.get(lt.size(), r"ranks .*")
    return f"{others}: {of}; rank {lt.size() - 1}: {last}"


def sgd(model: nn.Module, lr: float = 0.1, **options: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=lr, **options)


@pytest.mark.parametrize("method", METHODS)
def test_other_class_is_an_error_on_every_rank(method: str) -> None:
    model = nn.Linear(4, 1)
    base = torch.optim.Adam(model.parameters(), lr=0.1) if is_last() else sgd(model)
    with refused(rf"Class: {ranks(r'torch.optim.sgd.SGD', r'torch.optim.adam.Adam')}\. Give"):
        METHODS[method](base, model=model)


@pytest.mark.parametrize(
    ("usual", "differing", "stated"),
    [
        ({"momentum": 0.9}, {"momentum": 0.5}, "momentum: {0.9; 0.5}"),
        ({"momentum": 0.9, "nesterov": True}, {"momentum": 0.9}, "nesterov: {True; False}"),
        ({"weight_decay": 0}, {"weight_decay": 1e-4}, "weight_decay: {0; 0.0001}"),
        ({"lr": 0.001}, {"lr": 0.1}, "lr: {0.001; 0.1}"),
    ],
)
def test_other_hyperparameter_is_an_error_on_every_rank(usual: Any, differing: Any, stated: str) -> None:
    model = nn.Linear(4, 1)
    values = stated[stated.index("{") + 1 : -1].split("; ")
    with refused(stated[: stated.index("{")] + ranks(*values)):
        lt.DistributedOptimizer(sgd(model, **{"lr": 0.1, **(differing if is_last() else usual)}), model=model)


def test_parameter_groups_are_compared_one_by_one() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    decay = 0.01 if is_last() else 0.0
    groups = [{"params": model[0].parameters()}, {"params": model[1].parameters(), "weight_decay": decay}]
    base = torch.optim.AdamW(groups, lr=0.1, weight_decay=0.5)
    with refused(r"weight_decay: .*0.5, 0 \(by parameter group\); rank . *\d*: 0.5, 0.01"):
        lt.SlowMo(base, model=model, period=2)


class Lookahead(torch.optim.SGD):
    """As users write them: hyperparameters are attributes, one of them private; and a counter."""

    def __init__(self, parameters: Any, k: int = 5, alpha: float = 0.5, mode: str = "slow", rank: int = 0) -> None:
        super().__init__(parameters, lr=0.1)
        self.k, self._alpha, self.mode, self.rank = k, alpha, mode, rank
        self.steps_taken = 0


@pytest.mark.parametrize(
    ("differing", "stated"),
    [({"k": 6}, "k: {5; 6}"), ({"alpha": 0.8}, "alpha: {0.5; 0.8}"), ({"mode": "x"}, "mode: {'slow'; 'x'}")],
)
def test_hyperparameters_that_are_plain_attributes_are_compared(differing: Any, stated: str) -> None:
    model = nn.Linear(4, 1)
    values = stated[stated.index("{") + 1 : -1].split("; ")
    with refused(stated[: stated.index("{")] + ranks(*values)):
        lt.DistributedOptimizer(Lookahead(model.parameters(), **(differing if is_last() else {})), model=model)


def test_counters_are_a_warning_and_the_rank_may_differ(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1)
    base = Lookahead(model.parameters(), rank=lt.rank())
    base.steps_taken = int(is_last())
    with caplog.at_level(logging.WARNING, "lentando"):
        lt.SlowMo(base, model=model, period=2)
    found = [record.getMessage() for record in caplog.records if "different state" in record.getMessage()]
    assert len(found) == (lt.rank() == 0 and lt.size() > 1)
    assert all("steps_taken=1" in text for text in found)


def test_an_attribute_decides_nothing_but_the_comparison() -> None:
    """``eps`` in a parameter group makes base_buffers="auto" keep the state; an attribute of this name never did."""

    class WithEps(torch.optim.SGD):
        def __init__(self, parameters: Any, eps: float) -> None:
            super().__init__(parameters, lr=0.1)
            self.eps = eps

    model = nn.Linear(4, 1)
    optimizer = lt.SlowMo(WithEps(model.parameters(), 1e-8), model=model, period=2)
    assert optimizer._replica.settings.base_buffers == "reset"


def test_what_chooses_an_implementation_may_differ() -> None:
    model = nn.Linear(4, 1)
    options: Any = {"fused": True, "capturable": False} if is_last() else {"foreach": False}
    rate: Any = torch.tensor(0.1) if is_last() else 0.1
    lt.DistributedOptimizer(torch.optim.AdamW(model.parameters(), lr=rate, **options), model=model)


def test_objects_with_an_address_are_no_difference() -> None:
    model = nn.Linear(4, 1)
    groups = [{"params": model.parameters(), "tag": object(), "rule": lambda x: x}]
    lt.DistributedOptimizer(torch.optim.SGD(groups, lr=0.1), model=model)


def train(optimizer: lt.DistributedOptimizer, model: nn.Module, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.full((2, 4), float(lt.rank() + step))).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def warned(log: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in log.records if r.levelno >= logging.WARNING and "rates differ" in r.getMessage()]


@pytest.mark.parametrize("method", ["allreduce", "slowmo", "local sgd", "osgp, slowmo", "diloco"])
def test_rates_that_come_apart_are_named_once(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1)
    optimizer = METHODS[method](sgd(model, 1e-3), model=model)
    train(optimizer, model, 2)
    assert not warned(caplog)
    if is_last():
        optimizer.param_groups[0]["lr"] = 1e-4
    train(optimizer, model, 6)
    expected = 1 if lt.size() > 1 and lt.rank() == 0 else 0  # rank 0 warns
    assert len(warned(caplog)) == expected
    if expected:
        assert f"{lt.size() - 1}: 0.0001" in warned(caplog)[0]
        assert "0.001;" in warned(caplog)[0]


def test_rates_of_single_groups_that_come_apart_are_noticed(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    groups = [{"params": layer.parameters(), "lr": rate} for layer, rate in zip(model, (1e-3, 3e-3), strict=True)]
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(groups), model=model)
    if is_last():  # by which the mean stays
        groups[0]["lr"], groups[1]["lr"] = 3e-3, 1e-3
        for group, other in zip(optimizer.param_groups, groups, strict=True):
            group["lr"] = other["lr"]
    train(optimizer, model, 3)
    assert len(warned(caplog)) == (1 if lt.size() > 1 and lt.rank() == 0 else 0)
    assert all("those of single groups differ" in text for text in warned(caplog))


@pytest.mark.parametrize("method", ["allreduce", "slowmo", "sgp"])
def test_rates_may_differ_on_purpose(method: str, caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1)
    base = sgd(model, 1e-3 / (1 + lt.rank()))
    schedule = torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    optimizer = METHODS[method](base, model=model, rates_may_differ=True)
    train(optimizer, model, 3)
    schedule.step()
    train(optimizer, model, 3)
    assert not warned(caplog)


def test_gossip_without_a_period_compares_rates_when_the_average_is_evaluated(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nn.Linear(4, 1)
    optimizer = METHODS["sgp"](sgd(model, 1e-3), model=model)
    optimizer.param_groups[0]["lr"] = 1e-4 if is_last() else 1e-3
    train(optimizer, model, 3)
    assert not warned(caplog)
    optimizer.consensus_distance()
    assert len(warned(caplog)) == (1 if lt.size() > 1 and lt.rank() == 0 else 0)


def test_unequal_numbers_of_steps_on_one_schedule_are_no_difference(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(4, 1)
    base = sgd(model, 1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(base, 0.9)
    optimizer = lt.DistributedOptimizer(base, model=model, base=lt.LocalSGD(), period=3)
    with lt.join(optimizer):
        for _ in range(4 + lt.rank()):
            train(optimizer, model, 1)
            schedule.step()
    assert not warned(caplog)


def test_hyperparameters_of_a_group_that_is_added_are_compared() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 1))
    base = torch.optim.SGD(model[0].parameters(), lr=1e-3, momentum=0.5)
    optimizer = lt.DistributedOptimizer(base, model=model, base=lt.LocalSGD(), period=2)
    train(optimizer, model, 2)
    momentum = 0.1 if is_last() else 0.5
    with refused(r"the base optimizers differ between ranks. momentum: .*0.5; .*0.5, 0.1 \(by parameter group\)"):
        optimizer.add_param_group({"params": model[1].parameters(), "momentum": momentum})
