"""Buffers that are constant and not finite (masks, observers) are no divergence, whatever the method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt
from lentando.comm.objects import broadcast_object
from lentando.comm.world import transport

inf, nan = torch.inf, torch.nan

METHODS: dict[str, dict[str, Any]] = {
    "local": {"base": lt.LocalSGD(), "period": 2},
    "slowmo": {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(0.9, 0.5), "period": 2, "base_buffers": "average"},
    "sgp": {"base": lt.SGP(), "outer": lt.SlowMomentum(), "period": 3},
    "without average": {"base": lt.SGP(), "outer": lt.SlowMomentum(), "period": 2, "exact_average": False},
    "skip": {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(1.0, 0.5), "period": 2, "on_nonfinite": "skip"},
}


class Net(nn.Module):
    """BatchNorm, and constants before and behind its statistics."""

    def __init__(self, masked: bool, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.first = nn.Linear(5, 6)
        if masked:
            self.register_buffer("mask", torch.full((7, 7), -inf).triu(1))
        self.norm = nn.BatchNorm1d(6)
        self.out = nn.Linear(6, 2)
        if masked:
            self.register_buffer("unseen", torch.tensor([inf, -inf, 1.5, nan]))
            self.register_buffer("smallest", torch.tensor(torch.finfo(torch.float32).min))
        self.to(dtype)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.norm(self.first(x)))
        return result


def net(masked: bool, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(1)
    return Net(masked, dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 6) -> None:
    generator = torch.Generator().manual_seed(lt.rank())
    dtype = next(model.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.randn(8, 5, generator=generator).to(dtype)) ** 2).mean().backward()
        optimizer.step()


def wrap(model: nn.Module, **method: Any) -> lt.DistributedOptimizer:
    return lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.5), model=model, **method)


def assert_same(one: torch.Tensor, other: torch.Tensor, name: str) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True, msg=name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", METHODS)
def test_constants_keep_their_values_and_all_else_trains_as_without_them(name: str, dtype: torch.dtype) -> None:
    plain, model, before = net(False, dtype), net(True, dtype), net(True, dtype).state_dict()
    train(plain, wrap(plain, **METHODS[name]))
    optimizer = wrap(model, **METHODS[name])
    train(model, optimizer)
    for key, value in model.state_dict().items():
        expected = plain.state_dict().get(key, before[key])
        assert_same(value, expected, key)
    with optimizer.averaged():
        for key in ("mask", "unseen", "smallest"):
            assert_same(model.state_dict()[key], before[key], key)
    assert optimizer.report()["left_out"] == 0


def test_they_survive_a_rank_without_batches_and_a_checkpoint(tmp_path: Path) -> None:
    model = net(True)
    optimizer = wrap(model, **METHODS["skip"])
    with lt.join(optimizer):
        train(model, optimizer, 0 if lt.rank() == lt.size() - 1 else 4)
    folder = broadcast_object(transport(), str(tmp_path))
    lt.save(folder, optimizer)
    other = net(True)
    continued = wrap(other, **METHODS["skip"])
    lt.load(folder, continued)
    train(other, continued)
    for key in ("mask", "unseen", "smallest"):
        assert_same(other.state_dict()[key], net(True).state_dict()[key], key)


@pytest.mark.parametrize("diverged", ["norm.running_var", "unseen", "mask"])
def test_a_buffer_that_diverges_is_named_all_the_same(diverged: str) -> None:
    model = net(True)
    optimizer = wrap(model, **METHODS["local"])
    train(model, optimizer, 3)
    if lt.rank() == lt.size() - 1:
        value = model.state_dict()[diverged]
        value.reshape(-1)[value.isfinite().reshape(-1).nonzero()[0]] = nan
    with pytest.raises(lt.NonFiniteError, match=rf"(?s)rank {lt.size() - 1}: '{diverged}' is not finite.*diverged"):
        train(model, optimizer, 1)


def test_a_constant_that_was_set_after_wrapping_is_an_error_that_says_what_to_do() -> None:
    model = net(False)
    model.register_buffer("late", torch.zeros(3))
    optimizer = wrap(model, **METHODS["local"])
    model.get_buffer("late").fill_(-inf)
    with pytest.raises(lt.NonFiniteError, match="'late' is not finite.*must hold them when the optimizer is wrapped"):
        train(model, optimizer, 2)


def test_an_observer_that_has_seen_data_is_averaged() -> None:
    model = net(True)
    optimizer = wrap(model, **METHODS["local"])
    model.get_buffer("unseen").fill_(float(lt.rank()))
    train(model, optimizer, 2)
    assert model.get_buffer("unseen").tolist() == [(lt.size() - 1) / 2] * 4
