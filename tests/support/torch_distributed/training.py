"""What the cases train: models with layers of mixed sizes, and batches that differ between ranks."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

FEATURES = 6
Tensors = dict[str, torch.Tensor]


class Uneven(nn.Module):
    """Layers of 1 to 30000 parameters, so that gradients go to several buckets of one parameter or many."""

    def __init__(self, normalization: bool = False) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, 100),
            nn.BatchNorm1d(100) if normalization else nn.Identity(),
            nn.Tanh(),
            nn.Linear(100, 300),
            nn.Tanh(),
            nn.Linear(300, 3, bias=False),
            nn.Linear(3, 1),
        )
        self.scale = nn.Parameter(torch.full((1,), 0.5))  # FSDP and PowerSGD want a dimension

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.scale * self.layers(inputs)
        return outputs


def batch(step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and targets of this rank."""
    generator = torch.Generator().manual_seed(1000 * step + dist.get_rank())
    inputs = torch.randn(size, FEATURES, generator=generator)
    return inputs, inputs.sum(1, keepdim=True).sin()


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    inputs, targets = batch(step)
    return nn.functional.mse_loss(model(inputs), targets)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None = None,
    steps: int = 4,
    loss: Callable[[nn.Module, int], torch.Tensor] = loss_of,
) -> Tensors:
    """Train, and return the losses of this rank and the parameters and buffers at the end."""
    optimizer = sgd(model) if optimizer is None else optimizer
    losses = []
    for step in range(steps):
        optimizer.zero_grad()
        found = loss(model, step)
        found.backward()
        optimizer.step()
        losses.append(found.detach())
    return {"losses": torch.stack(losses), **state_of(model)}


def state_of(model: nn.Module) -> Tensors:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}
