"""Models of every dtype and memory format, and parameters that are copied to host memory to be sent."""

import copy

import pytest
import torch
from torch import nn
from torch_training import assert_equal_on_all_ranks, everyones, make, net, sgd, train

import lentando.torch as lt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["slowmo", "allreduce"])
def test_models_of_every_floating_point_dtype(dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    optimizer = make(kind, model)
    for step in range(8):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(lt.rank() + 100 * step)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert_equal_on_all_ranks(model)
    assert all(torch.isfinite(p).all() and p.dtype == dtype for p in model.parameters())


def test_bfloat16_parameters_are_averaged_in_float32() -> None:
    model = nn.Linear(64, 1, bias=False).bfloat16()
    optimizer = lt.DistributedOptimizer(sgd(model), base=lt.LocalSGD(), period=1)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    optimizer._replica.before_step()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(1 + lt.rank())))
    mean = torch.stack(everyones(model.weight)).double().mean(dim=0)
    optimizer.step()
    assert torch.equal(model.weight, mean.to(torch.bfloat16))


def test_model_of_two_dtypes_has_two_flat_buffers() -> None:
    model = nn.Sequential(nn.Linear(5, 8).double(), nn.Linear(3, 2))
    optimizer = lt.SlowMo(sgd(model), model=model, period=1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(lt.rank()))
    optimizer.step()
    assert_equal_on_all_ranks(model)


def test_memory_order_survives() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    optimizer = lt.DistributedOptimizer(sgd(model), model=model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight, twin.weight)
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(lt.rank()))
    model(images).square().mean().backward()
    mean = torch.stack(everyones(model.weight.grad)).mean(dim=0)
    optimizer.step()
    assert torch.allclose(model.weight, twin.weight - 0.05 * mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["slowmo", "allreduce"])
def test_staged_memory_gives_the_same_results(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, host memory apart from the parameters, on a CPU. No GPU has been used here."""
    direct = net()
    optimizer = make(kind, direct)
    train(optimizer, direct, 9)

    from lentando.torch import optimizer as module

    monkeypatch.setattr(module, "TorchModel", lambda *arguments: TorchModel(*arguments, staged=True))
    from lentando.torch.model import TorchModel

    staged = net()
    optimizer = make(kind, staged)
    assert optimizer._model._memory[0].flat.data_ptr() != optimizer._model._memory[0]._host.data_ptr()
    train(optimizer, staged, 9)
    for mine, other in zip(direct.state_dict().values(), staged.state_dict().values(), strict=True):
        assert torch.equal(mine, other)
