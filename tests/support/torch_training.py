"""A small model and its training in PyTorch, shared by the tests that run on several ranks."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import reference
import torch
from torch import nn

import lentando.torch as lt

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)


def vector() -> nn.Linear:
    """A model that is one float64 vector."""
    model = nn.Linear(DIMENSION, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(START)[None])
    return model


def set_gradient(model: nn.Linear, step: int) -> None:
    x = model.weight.detach().numpy()[0]
    model.weight.grad = torch.from_numpy(QUADRATIC(lt.rank(), step, x))[None]


def train_vector(optimizer: lt.DistributedOptimizer, model: nn.Linear, steps: int) -> np.ndarray[Any, Any]:
    for step in range(steps):
        set_gradient(model, step)
        optimizer.step()
    return model.weight.detach().numpy()[0]


class Net(nn.Module):
    """Convolution, BatchNorm (floating-point and integer buffers), tied, frozen and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.unused = nn.Linear(3, 3)
        self.out = nn.Linear(4, 2)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        result: torch.Tensor = self.out(self.tied(self.first(self.frozen(x)).tanh()))
        return result


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def batches(steps: int, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * lt.rank() + step)
        yield torch.randn(6, 1, 5, 5, generator=generator), torch.randint(0, 2, (6,), generator=generator)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, first: int = 0) -> None:
    for images, labels in batches(steps, first):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step(loss=loss) if isinstance(optimizer, lt.DistributedOptimizer) else optimizer.step()


def everyones(tensor: torch.Tensor) -> list[torch.Tensor]:
    return lt.allgather_object(tensor.detach().clone())


def assert_equal_on_all_ranks(model: nn.Module, names: str = "") -> None:
    for name, tensor in model.state_dict().items():
        if names in name:
            for other in everyones(tensor):
                assert torch.equal(other, tensor), name


def assert_same_model(model: nn.Module, other: nn.Module, when: str = "", but: str | None = None) -> None:
    """Bit-identical, apart from tensors whose names contain ``but``."""
    for (name, mine), theirs in zip(model.state_dict().items(), other.state_dict().values(), strict=True):
        if but is None or but not in name:
            assert torch.equal(mine, theirs), f"{name} {when}"


def make(kind: str, model: nn.Module) -> lt.DistributedOptimizer:
    if kind == "slowmo":
        return lt.SlowMo(sgd(model), model=model, period=4, slow_momentum=0.6)
    if kind == "slowmo, adam":
        return lt.SlowMo(torch.optim.Adam(model.parameters(), lr=0.01), model=model, period=3, base_buffers="maintain")
    if kind == "localsgd":
        return lt.DistributedOptimizer(sgd(model), model=model, base=lt.LocalSGD(), period=lt.PostLocal(2, 3))
    return lt.DistributedOptimizer(sgd(model), model=model, base=lt.AllReduce())
