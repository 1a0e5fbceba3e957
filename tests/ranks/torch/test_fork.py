"""Children of a rank (evaluation, data loaders) change neither its weights nor its gradients."""

import copy
from typing import Any

import pytest
import torch
from forking import succeeds_in_child
from torch import nn
from torch.utils.data import DataLoader, Dataset

import lentando.torch as lt

pytestmark = pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")

METHODS: dict[str, dict[str, Any]] = {
    "overlap": {"base": lt.AllReduce(overlap=True)},
    "slowmo": {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(1.0, 0.5), "period": 2},
}


class Reads(Dataset[torch.Tensor]):
    """Spoils the model in the worker that reads it, if asked to."""

    def __init__(self, model: nn.Module, spoils: bool) -> None:
        self.model, self.spoils = model, spoils

    def __len__(self) -> int:
        return 8

    def __getitem__(self, number: int) -> torch.Tensor:
        if self.spoils:
            for parameter in self.model.parameters():
                parameter.detach().fill_(torch.nan)
        return torch.full((5,), float(number))


def train(method: dict[str, Any], workers: int) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 300), nn.BatchNorm1d(300), nn.Linear(300, 2))
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.01), model=model, **method)
    loader = DataLoader(Reads(model, workers > 0), batch_size=2, num_workers=workers)
    for batch in loader:
        optimizer.zero_grad()
        (model(batch + lt.rank()) ** 2).mean().backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


@pytest.mark.parametrize("name", METHODS)
def test_workers_of_a_data_loader_that_write_into_the_model_change_nothing(name: str) -> None:
    expected, found = train(METHODS[name], 0), train(METHODS[name], 1)
    for key, tensor in expected.items():
        assert torch.equal(found[key], tensor), key


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_evaluation_in_a_child_changes_neither_weights_nor_gradients(dtype: torch.dtype) -> None:
    model = nn.Linear(512, 64).to(dtype)
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    model(torch.ones(2, 512, dtype=dtype)).sum().backward()
    optimizer.step()
    before = [tensor.clone() for p in model.parameters() for tensor in (p.detach(), p.grad) if tensor is not None]

    def spoil() -> None:
        with torch.no_grad():
            for parameter in model.parameters():
                assert parameter.grad is not None
                parameter.zero_()
                parameter.grad.zero_()
            assert not model(torch.ones(1, 512, dtype=dtype)).any()

    assert succeeds_in_child(spoil)
    after = [tensor for p in model.parameters() for tensor in (p.detach(), p.grad) if tensor is not None]
    assert len(after) == 4
    for one, other in zip(before, after, strict=True):
        assert torch.equal(one, other)
