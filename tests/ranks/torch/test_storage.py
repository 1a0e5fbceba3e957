"""Each tensor of a wrapped model has a storage of its own, so that tools that go by storage find what they expect."""

import copy
import gc
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_model, save_model
from torch import nn

import lentando.torch as lt


class Net(nn.Module):
    """Two memory orders, four dtypes, tied parameters, one without axes and one without elements, and a statistic."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
        self.volume = nn.Conv3d(2, 3, 2).to(memory_format=torch.channels_last_3d)
        self.norm = nn.BatchNorm2d(4)
        self.out = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.out.weight
        self.scale = nn.Parameter(torch.tensor(2.0))
        self.empty = nn.Parameter(torch.zeros(0, 5))
        self.in_float16 = nn.Parameter(torch.rand(3).half())
        self.in_bfloat16 = nn.Parameter(torch.rand(3, 2).bfloat16())
        self.in_float64 = nn.Parameter(torch.rand(2, 2).double())


def net() -> Net:
    torch.manual_seed(3)
    return Net()


def wrap(model: nn.Module, **options: Any) -> lt.DistributedOptimizer:
    return lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model, **options)


def saved_bytes(tensors: dict[str, torch.Tensor]) -> int:
    file = io.BytesIO()
    torch.save(tensors, file)
    return len(file.getvalue())


def by_storage(model: nn.Module) -> list[list[str]]:
    """The names of the tensors of each storage, as accelerate, transformers and safetensors find them."""
    names = defaultdict(list)
    for name, tensor in model.state_dict().items():
        storage = tensor.untyped_storage()
        names[tensor.device, storage.data_ptr(), storage.nbytes()].append(name)
    return sorted(names.values())


def check_own_storages(tensors: dict[str, torch.Tensor]) -> None:
    for name, tensor in tensors.items():
        storage = tensor.untyped_storage()
        assert storage.nbytes() == tensor.numel() * tensor.element_size(), name
        assert (tensor.storage_offset(), storage.data_ptr()) == (0, tensor.data_ptr()), name


@pytest.mark.parametrize("options", [{"base": lt.LocalSGD(), "period": 2}, {"base": lt.SGP()}], ids=["local", "sgp"])
def test_each_parameter_has_a_storage_of_its_own_with_its_values_and_strides(options: dict[str, Any]) -> None:
    plain, model = net(), net()
    optimizer = wrap(model, **options)
    parameters = dict(model.named_parameters())
    check_own_storages(parameters)
    for name, before in plain.named_parameters():
        assert torch.equal(before, parameters[name])
        assert before.stride() == parameters[name].stride()
        assert before.dtype == parameters[name].dtype
    assert model.tied.weight is model.out.weight
    assert by_storage(model) == by_storage(plain)
    del optimizer
    gc.collect()
    assert torch.equal(plain.conv.weight, model.conv.weight)  # its memory is still there


def test_files_have_the_size_that_they_have_without_wrapping(tmp_path: Path) -> None:
    plain = nn.Sequential(nn.Linear(300, 300), nn.Linear(300, 2))
    model = copy.deepcopy(plain)
    wrap(model, base=lt.LocalSGD(), period=2)
    assert saved_bytes(model[1].state_dict()) == saved_bytes(plain[1].state_dict())
    assert saved_bytes(model.state_dict()) == saved_bytes(plain.state_dict())
    assert saved_bytes({"first": model[0].weight.detach()[:1]}) == saved_bytes({"first": plain[0].weight.detach()[:1]})
    file = tmp_path / "model.pt"
    torch.save(model.state_dict(), file)
    for name, tensor in torch.load(file).items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_safetensors_saves_and_loads_the_model_and_finds_what_is_tied(tmp_path: Path) -> None:
    model = net()
    wrap(model, base=lt.LocalSGD(), period=2)
    save_model(model, str(tmp_path / "model.safetensors"))
    other = net()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    missing, unexpected = load_model(other, str(tmp_path / "model.safetensors"))
    assert (missing, unexpected) == (set(), [])
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[name])
    load_model(model, str(tmp_path / "model.safetensors"))  # in place, into what was wrapped


def test_a_deep_copy_shares_nothing_and_is_no_larger() -> None:
    model = net()
    wrap(model, base=lt.LocalSGD(), period=2)
    copied = copy.deepcopy(model)
    assert by_storage(copied) == by_storage(model)
    check_own_storages(dict(copied.named_parameters()))
    with torch.no_grad():
        copied.conv.weight.zero_()
    assert not torch.equal(copied.conv.weight, model.conv.weight)


@pytest.mark.parametrize("overlap", [False, True])
def test_averaged_gradients_have_storages_of_their_own_and_are_not_disturbed_by_the_user(overlap: bool) -> None:
    plain, model = (nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 2)) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    optimizer = wrap(model, base=lt.AllReduce(overlap=overlap))
    reference = torch.optim.SGD(plain.parameters(), lr=0.1)
    lt.broadcast_parameters(plain.state_dict(), 0)
    for step in range(3):
        for one in (model, plain):
            one.zero_grad()
            (one(torch.full((3, 6), 0.5 + step)) ** 2).mean().backward()
        optimizer.step()
        reference.step()
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        assert len(gradients) == 4
        check_own_storages(gradients)
        for gradient in gradients.values():
            gradient.squeeze_().unsqueeze_(0)
        for one, other in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(one, other)
