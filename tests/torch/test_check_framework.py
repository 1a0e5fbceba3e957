"""The PyTorch adapter passes the conformance suite for frameworks."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import nn

from lentando.comm.transport import Array
from lentando.optimizers.testing import check_framework
from lentando.torch.convert import as_array, as_tensor
from lentando.torch.model import TorchModel


class Subject:
    """Two layers in two parameter groups, with a BatchNorm between them, or layers of two dtypes."""

    def __init__(self, optimizer: Callable[..., torch.optim.Optimizer], dtypes: Sequence[torch.dtype], staged: bool):
        torch.manual_seed(0)
        self.module = nn.Sequential(
            nn.Linear(3, 4, dtype=dtypes[0]), nn.BatchNorm1d(4), nn.Linear(4, 2, dtype=dtypes[1])
        )
        self.module[2].bias.requires_grad_(False)
        first, norm, last = (list(layer.parameters()) for layer in self.module)
        groups = [{"params": [*first, *norm]}, {"params": last, "lr": 0.0625}]
        self.framework = TorchModel(optimizer(groups, lr=0.125), self.module, staged=staged)
        self.optimizer = self.framework.optimizer

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        names = {entry.name for buffer in self.framework.buffers for entry in buffer.layout.entries}
        state = self.module.state_dict(keep_vars=True)
        return {name: tensor.detach() for name, tensor in state.items() if name in names}

    def read(self) -> Mapping[str, Array]:
        return {name: as_array(tensor.clone()) for name, tensor in self.tensors.items()}

    def assign(self, values: Mapping[str, Array]) -> None:
        state = {name: as_tensor(array.copy()) for name, array in values.items()}
        self.module.load_state_dict({**self.module.state_dict(), **state})

    def set_learning_rates(self, rates: Sequence[float]) -> None:
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def set_gradients(self, gradients: Mapping[str, Array]) -> None:
        for name, parameter in self.module.named_parameters():
            if name in gradients:
                parameter.grad = as_tensor(gradients[name].copy())

    def gather_gradients(self) -> None:
        self.framework.flat_gradients.gather()

    def scatter_gradients(self) -> None:
        self.framework.flat_gradients.scatter()

    def step(self) -> None:
        self.optimizer.step()


def sgd(groups: Any, lr: float) -> torch.optim.Optimizer:
    return torch.optim.SGD(groups, lr=lr, momentum=0.5)


@pytest.mark.slow
@pytest.mark.parametrize("staged", [False, True])
@pytest.mark.parametrize(
    ("optimizer", "dtypes"),
    [
        (sgd, (torch.float32, torch.float32)),
        (sgd, (torch.float64, torch.bfloat16)),
        (torch.optim.Adam, (torch.float32, torch.float32)),
    ],
    ids=["SGD", "SGD in float64 and bfloat16", "Adam"],
)
def test_the_adapter_keeps_the_promises_of_the_seam(
    optimizer: Callable[..., torch.optim.Optimizer], dtypes: Sequence[torch.dtype], staged: bool
) -> None:
    check_framework(lambda: Subject(optimizer, dtypes, staged))
