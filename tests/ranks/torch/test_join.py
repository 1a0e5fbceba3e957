"""Uneven data in PyTorch: ``with lt.join(optimizer):`` round loops of unequal length."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose
from torch import nn
from torch_training import assert_same_model

import lentando.torch as lt

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)


def changing(step: int) -> float:
    return 0.05 + 0.02 * (step % 7)


def counts() -> list[int]:
    """Of batches, by rank: none on the first of several."""
    return [4 * rank % 11 for rank in range(lt.size())] if lt.size() > 1 else [6]


def vector() -> nn.Linear:
    """A model that is one float64 vector."""
    model = nn.Linear(DIMENSION, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(START)[None])
    return model


def value(model: nn.Linear) -> Any:
    return model.weight.detach().numpy()[0]


def train_vector(optimizer: lt.DistributedOptimizer, model: nn.Linear, rates: Callable[[int], float]) -> Any:
    """Each step has its own learning rate, of which a rank that takes no more steps does not hear."""
    with lt.join(optimizer):
        for step in range(counts()[lt.rank()]):
            optimizer.param_groups[0]["lr"] = rates(step)
            model.weight.grad = torch.from_numpy(QUADRATIC(lt.rank(), step, value(model)))[None]
            optimizer.step()
    return value(model)


class Net(nn.Module):
    """BatchNorm has statistics; the parameters are as many as neighbours read from each other's memory."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(8, 400)
        self.norm = nn.BatchNorm1d(400)
        self.middle = nn.Linear(400, 400)
        self.out = nn.Linear(400, 2)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.out(self.middle(self.norm(self.first(inputs))).relu())
        return result


def net() -> Net:
    torch.manual_seed(0)
    return Net()


def train(optimizer: Any, model: nn.Module, steps: int, seed: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(1000 * seed + step)
        inputs = torch.randn(6, 8, generator=generator)
        labels = torch.randint(0, 2, (6,), generator=generator)
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), labels)
        loss.backward()
        optimizer.step()


def assert_equal_on_all_ranks(tensors: Any) -> None:
    for name, tensor in tensors.items():
        for other in lt.allgather_object(tensor.detach().clone()):
            assert torch.equal(other, tensor), name


@pytest.mark.parametrize("momentum", [0.0, 0.6])
def test_slowmo_averages_over_the_ranks_that_took_steps(momentum: float) -> None:
    model = vector()
    base = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = lt.SlowMo(base, model=model, period=4, slow_lr=0.8, slow_momentum=momentum)
    expected = reference.uneven_slowmo(counts(), START, QUADRATIC, 4, changing, 0.8, momentum)
    assert_allclose(train_vector(optimizer, model, changing), expected.x[0], rtol=1e-11, atol=1e-11)
    assert_equal_on_all_ranks(model.state_dict())
    assert optimizer.report()["inner_steps"] == max(counts())


def test_ended_ranks_step_along_averaged_gradients_at_the_others_learning_rates() -> None:
    model = vector()
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.75))
    expected = reference.uneven_synchronous_sgd(counts(), START, QUADRATIC, changing, 0.75)
    assert_allclose(train_vector(optimizer, model, changing), expected, rtol=1e-11)
    own = counts()[lt.rank()]
    assert optimizer.param_groups[0]["lr"] == (changing(own - 1) if own else 0.5)


@pytest.mark.skipif(lt.size() == 1, reason="no rank is without batches")
def test_gradients_that_are_not_finite_are_an_error_where_a_rank_has_no_batch() -> None:
    model = net()
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}

    def train_on_nothing_finite() -> None:
        with lt.join(optimizer):
            for _ in range(lt.rank()):
                model(torch.full((6, 8), float("nan"))).sum().backward()
                optimizer.step()

    with pytest.raises(lt.NonFiniteError, match="the gradient of 'first.weight' is not finite"):
        train_on_nothing_finite()
    assert all(torch.equal(parameter, before[name]) for name, parameter in model.named_parameters())


@pytest.mark.parametrize("name", ["Adam", "RMSprop", "Adagrad"])
def test_state_of_the_optimizer_is_everybodys_after_averaged_gradients(name: str) -> None:
    """So that the next epoch continues with the same replicas."""
    model = net()
    optimizer = lt.DistributedOptimizer(getattr(torch.optim, name)(model.parameters(), lr=0.01), model=model)
    for _ in range(2):
        with lt.join(optimizer):
            train(optimizer, model, counts()[lt.rank()], lt.rank())
    assert_equal_on_all_ranks(dict(model.named_parameters()))
    for parameter in model.parameters():
        assert_equal_on_all_ranks(optimizer.state[parameter])


ALONE: dict[str, dict[str, Any]] = {
    "all-reduce": {"base": lt.AllReduce(), "period": 3},
    "all-reduce, ring": {"base": lt.AllReduce("ring"), "period": 3, "algorithm": "ring"},
    "local": {"base": lt.LocalSGD(), "period": 3},
    "local, ring": {"base": lt.LocalSGD(), "period": 3, "algorithm": "ring"},
    "local, engine": {"base": lt.LocalSGD(), "period": 3, "algorithm": "backend"},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", ALONE)
def test_only_rank_with_data_trains_as_if_it_were_alone(method: str, dtype: torch.dtype) -> None:
    """Bit-identically: nothing of the others is in the averages, statistics included."""
    alone, model = net().to(dtype), net().to(dtype)
    last = lt.size() - 1
    torch.set_default_dtype(dtype)
    try:
        train(torch.optim.SGD(alone.parameters(), lr=0.05), alone, 7, last)
        optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model=model, **ALONE[method])
        with lt.join(optimizer):
            train(optimizer, model, 7 if lt.rank() == last else 0, last)
    finally:
        torch.set_default_dtype(torch.float32)
    for (name, mine), theirs in zip(model.state_dict().items(), alone.state_dict().values(), strict=True):
        if mine.is_floating_point():
            assert torch.equal(mine, theirs), name


def test_statistics_over_gossip_are_those_of_the_ranks_that_took_steps() -> None:
    model = net()
    last = lt.size() - 1
    base = torch.optim.SGD(model.parameters(), lr=0.0)
    optimizer = lt.DistributedOptimizer(base, model=model, base=lt.SGP(), period=3)
    alone = net()
    train(torch.optim.SGD(alone.parameters(), lr=0.0), alone, 7, last)
    with lt.join(optimizer):
        train(optimizer, model, 7 if lt.rank() == last else 0, last)
    torch.testing.assert_close(model.norm.running_mean, alone.norm.running_mean)
    torch.testing.assert_close(model.norm.running_var, alone.norm.running_var)


def test_training_that_was_joined_is_saved_and_continues_alike(shared_path: Path) -> None:
    model, again = net(), net()
    optimizer, resumed = (
        lt.SlowMo(torch.optim.SGD(m.parameters(), lr=0.05), model=m, period=3, slow_momentum=0.5)
        for m in (model, again)
    )
    with lt.join(optimizer):
        train(optimizer, model, counts()[lt.rank()], lt.rank())
    lt.save(shared_path, optimizer)
    lt.load(shared_path, resumed)
    for own, of in ((optimizer, model), (resumed, again)):
        with lt.join(own):
            train(own, of, 1 + lt.rank(), lt.rank())
        assert_equal_on_all_ranks(dict(of.named_parameters()))
        assert_equal_on_all_ranks({"mean": of.norm.running_mean, "variance": of.norm.running_var})
    assert_same_model(model, again)


def test_closures_and_synchronize_are_refused_where_gradients_are_averaged() -> None:
    model = vector()
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1))
    with lt.join(optimizer):
        with pytest.raises(lt.ConfigurationError, match=r"step\(closure\).* not possible inside join"):
            optimizer.step(lambda: None)
        with pytest.raises(lt.ConfigurationError, match=r"synchronize\(\) is not possible inside join"):
            optimizer.synchronize()


def test_join_needs_a_distributed_optimizer() -> None:
    with pytest.raises(lt.ConfigurationError, match="join needs a DistributedOptimizer, got SGD"):
        lt.join(torch.optim.SGD(vector().parameters(), lr=0.1))
