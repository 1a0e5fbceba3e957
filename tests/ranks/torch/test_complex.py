"""Complex parameters, buffers and sums: pairs of real numbers, with every method."""

from pathlib import Path
from typing import Any

import pytest
import torch
from case_selection import selected_cases
from torch import nn

import lentando.torch as lt
from lentando.comm.objects import broadcast_object
from lentando.comm.world import transport

METHODS: dict[str, dict[str, Any]] = {
    "allreduce": {"base": lt.AllReduce()},
    "overlap": {"base": lt.AllReduce(overlap=True)},
    "slowmo": {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(0.9, 0.5), "period": 2, "base_buffers": "average"},
    "sgp": {"base": lt.SGP(), "outer": lt.SlowMomentum(), "period": 3},
    "osgp": {"base": lt.OSGP(deterministic=True), "period": 2},
    "dpsgd": {"base": lt.DPSGD(), "period": 2},
}


class Net(nn.Module):
    """An odd number of real numbers before complex ones, and a statistic of each kind."""

    def __init__(self, dtype: torch.dtype = torch.complex64) -> None:
        super().__init__()
        real = torch.float64 if dtype == torch.complex128 else torch.float32
        self.scale = nn.Parameter(torch.ones(3, dtype=real))
        self.inner = nn.Linear(3, 5, dtype=dtype)
        self.out = nn.Linear(5, 1, dtype=dtype)
        self.register_buffer("bias", torch.zeros(1, dtype=real))
        self.register_buffer("mean", torch.zeros(5, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.inner(x * self.scale)
        with torch.no_grad():
            self.mean.lerp_(hidden.mean(0), 0.5)
        result: torch.Tensor = self.out(hidden - self.mean).abs() ** 2
        return result


def net(dtype: torch.dtype = torch.complex64) -> Net:
    torch.manual_seed(2)
    return Net(dtype)


def train(
    model: Net, optimizer: torch.optim.Optimizer, steps: int, first: int = 0, ranks: tuple[int, ...] = ()
) -> None:
    for step in range(first, first + steps):
        optimizer.zero_grad()
        generator = torch.Generator().manual_seed(100 * lt.rank() + step)
        x = torch.randn(6, 3, generator=generator, dtype=torch.float64).to(model.inner.weight.dtype)
        model(x).mean().backward()
        optimizer.step()


def adam(model: nn.Module, **method: Any) -> lt.DistributedOptimizer:
    return lt.DistributedOptimizer(torch.optim.Adam(model.parameters(), lr=0.01), model=model, **method)


def check_equal_on_all_ranks(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        for other in lt.allgather(torch.view_as_real(tensor) if tensor.is_complex() else tensor).chunk(lt.size()):
            mine = torch.view_as_real(tensor) if tensor.is_complex() else tensor
            torch.testing.assert_close(other.reshape(mine.shape), mine, rtol=0, atol=0, msg=name)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, torch.complex64) for name in METHODS),
        *((name, torch.complex128) for name in selected_cases(["slowmo"], [*METHODS])),
    ],
    ids=str,
)
def test_every_method_trains_and_resumes_them(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    model = net(dtype)
    optimizer = adam(model, **METHODS[name])
    assert all(p.data_ptr() % p.element_size() == 0 for p in model.parameters())
    train(model, optimizer, 3)
    folder = broadcast_object(transport(), str(tmp_path))
    lt.save(folder, optimizer)
    train(model, optimizer, 3, first=3)
    assert model.inner.weight.dtype == dtype
    if "period" in METHODS[name]:
        check_equal_on_all_ranks(model)
    other = net(dtype)
    continued = adam(other, **METHODS[name])
    lt.load(folder, continued)
    train(other, continued, 3, first=3)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, other.state_dict()[key]), key


def test_averaged_gradients_are_the_means_of_the_ranks() -> None:
    model = net(torch.complex128)
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.25), model=model)
    start = [parameter.detach().clone() for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, complex(1, lt.rank()) if parameter.is_complex() else lt.rank())
    optimizer.step()
    mean = (lt.size() - 1) / 2
    for before, parameter in zip(start, model.parameters(), strict=True):
        gradient = complex(1, mean) if parameter.is_complex() else mean
        torch.testing.assert_close(parameter.detach(), before - 0.25 * gradient)


def test_an_outer_step_gives_the_mean_of_the_ranks() -> None:
    model = nn.Linear(3, 2, dtype=torch.complex64)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), 0.5), model=model, period=1, slow_momentum=0.0)
    start = model.weight.detach().clone()
    model.weight.grad = torch.full_like(model.weight, complex(lt.rank(), -2 * lt.rank()))
    optimizer.step()
    mean = (lt.size() - 1) / 2
    torch.testing.assert_close(model.weight, start - 0.5 * complex(mean, -2 * mean))


@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128], ids=str)
@pytest.mark.parametrize("shape", [(), (3,), (2, 0), (2, 3)], ids=str)
def test_sums_and_averages_of_complex_tensors(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    own = torch.full(shape, complex(lt.rank() + 1, -lt.rank()), dtype=dtype)
    total = complex(lt.size() * (lt.size() + 1) / 2, -lt.size() * (lt.size() - 1) / 2)
    torch.testing.assert_close(lt.allreduce(own, op=lt.Sum), torch.full(shape, total, dtype=dtype))
    torch.testing.assert_close(lt.allreduce(own), torch.full(shape, total / lt.size(), dtype=dtype))
    conjugate = own.conj()
    torch.testing.assert_close(lt.allreduce_(conjugate, op=lt.Sum), torch.full(shape, total.conjugate(), dtype=dtype))
    for op in (lt.Min, lt.Max):
        with pytest.raises(lt.ConfigurationError, match="complex numbers have no order"):
            lt.allreduce(own, op=op)


def test_a_complex_tensor_does_not_meet_a_real_one_of_as_many_bytes() -> None:
    if lt.size() == 1:
        pytest.skip("needs another rank")
    tensor = torch.ones(3, dtype=torch.complex64) if lt.rank() == 0 else torch.ones(6)
    with pytest.raises(lt.MismatchError, match="complex64"):
        lt.allreduce(tensor, op=lt.Sum)
