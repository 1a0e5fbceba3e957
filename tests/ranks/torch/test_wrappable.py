"""Parameters and buffers that cannot be averaged are named; buffers that need not be are left alone."""

import copy
import logging
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt
from lentando.comm.objects import broadcast_object
from lentando.comm.world import transport


class Net(nn.Module):
    """A model with one parameter of a kind that is tried, and an ordinary one."""

    def __init__(self, weight: torch.Tensor, requires_grad: bool = True) -> None:
        super().__init__()
        self.plain = nn.Linear(2, 2)
        self.odd = nn.Parameter(weight, requires_grad=requires_grad)


def shares_memory() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = nn.Parameter(model[0].weight.data)
    return model


def shares_with_a_buffer() -> nn.Module:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model.register_buffer("alias", model[1].bias.data[1:])
    return model


class Wrapper(torch.Tensor):
    """A tensor without memory of its own, as DTensor is one."""

    @staticmethod
    def __new__(cls, shape: tuple[int, ...]) -> "Wrapper":
        made: Wrapper = torch.Tensor._make_wrapper_subclass(cls, shape)
        return made

    def __repr__(self) -> str:  # type: ignore[override]
        return "Wrapper()"

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten.detach.default:
            return cls(tuple(args[0].shape))
        raise NotImplementedError(str(func))


MODELS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "meta": (lambda: Net(torch.zeros(3, device="meta")), r"'odd' cannot.*meta device.*to_empty"),
    "sparse": (lambda: Net(torch.eye(3).to_sparse()), r"'odd' cannot.*sparse"),
    "float8": (lambda: Net(torch.zeros(3).to(torch.float8_e4m3fn)), r"'odd' cannot.*float8_e4m3fn.*float32"),
    "expanded": (lambda: Net(torch.zeros(1).expand(4)), r"'odd' cannot.*share one place.*clone"),
    "overlapping": (lambda: Net(torch.zeros(6).as_strided((4, 3), (1, 1))), r"'odd' cannot.*share one place"),
    "wrapper": (lambda: Net(Wrapper((3,))), r"'odd' cannot.*Wrapper.*whole replica"),
    "two names": (shares_memory, r"'0.weight' and '1.weight' share memory.*assigning the parameter itself"),
    "a buffer": (shares_with_a_buffer, r"'1.bias' and 'alias' share memory"),
    "lazy": (lambda: nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(2)), r"'1.weight' cannot.*Pass a batch"),
    "frozen on meta": (
        lambda: Net(torch.zeros(3, device="meta"), requires_grad=False),
        r"'odd' can be neither.*meta device",
    ),
}


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.filterwarnings("ignore:Lazy modules")
def test_a_parameter_that_cannot_be_wrapped_is_named_with_what_to_do(kind: str) -> None:
    make, message = MODELS[kind]
    model = make()
    with pytest.raises(lt.ConfigurationError, match=f"(?s){message}"):
        lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=2)


def test_a_sharded_parameter_of_fsdp_is_named(tmp_path: Path) -> None:
    distributed = pytest.importorskip("torch.distributed")
    tensor = pytest.importorskip("torch.distributed.tensor")
    store = distributed.FileStore(str(tmp_path / f"store{os.getpid()}"), 1)
    distributed.init_process_group("gloo", rank=0, world_size=1, store=store)
    try:
        mesh = distributed.device_mesh.init_device_mesh("cpu", (1,))
        model = Net(tensor.distribute_tensor(torch.ones(4), mesh, [tensor.Shard(0)]))
        with pytest.raises(lt.ConfigurationError, match=r"'odd' cannot.*DTensor.*fully_shard"):
            lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=2)
    finally:
        distributed.destroy_process_group()


BUFFERS: dict[str, Callable[[], torch.Tensor]] = {
    "float8": lambda: torch.tensor([1.0, lt.rank(), 3.0]).to(torch.float8_e5m2),
    "coo": (torch.eye(3) * (lt.rank() + 1)).to_sparse,
    "csr": (torch.eye(3) * (lt.rank() + 1)).to_sparse_csr,
    "expanded integers": lambda: torch.tensor([lt.rank()]).expand(4),
    "expanded": lambda: torch.tensor([float(lt.rank())]).expand(2, 4),
    "complex": lambda: torch.tensor([complex(1, lt.rank())]),
    "frozen complex128": lambda: nn.Parameter(torch.tensor([1j * lt.rank()], dtype=torch.complex128), False),
}


def dense(tensor: torch.Tensor) -> torch.Tensor:
    tensor = tensor.detach()
    return tensor.to_dense() if tensor.layout is not torch.strided else tensor.to(torch.complex128)


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta", "ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", BUFFERS)
def test_a_constant_buffer_of_any_kind_is_rank_0s_and_comes_back_from_a_checkpoint(kind: str, tmp_path: Path) -> None:
    def made() -> tuple[nn.Linear, lt.DistributedOptimizer]:
        model = nn.Linear(2, 2)
        odd = BUFFERS[kind]()
        model.register_parameter("odd", odd) if isinstance(odd, nn.Parameter) else model.register_buffer("odd", odd)
        base = torch.optim.SGD([model.weight, model.bias], lr=0.1)
        return model, lt.SlowMo(base, model=model, period=2, slow_momentum=0.5)

    def train(model: nn.Linear, optimizer: lt.DistributedOptimizer) -> None:
        for _ in range(2):
            optimizer.zero_grad()
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()

    model, optimizer = made()
    train(model, optimizer)
    expected = lt.broadcast(dense(BUFFERS[kind]()), 0)
    assert torch.equal(dense(model.odd), expected)
    folder = broadcast_object(transport(), str(tmp_path))
    lt.save(folder, optimizer)
    other, continued = made()
    with torch.no_grad():
        other.weight.zero_()
    lt.load(folder, continued)
    assert torch.equal(dense(other.odd), expected)
    train(other, continued)


def test_a_float8_buffer_that_changes_is_named_once(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("amax", torch.zeros(2).to(torch.float8_e5m2))
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=1, slow_momentum=0.5)
    with caplog.at_level(logging.WARNING, "lentando"):
        for step in range(3):
            model.amax.copy_(torch.full((2,), step + 1.0))
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
    assert [record.getMessage().count("'amax'") for record in caplog.records if "amax" in record.getMessage()] == [1]


def test_a_buffer_that_is_resized_is_averaged_from_then_on(tmp_path: Path) -> None:
    model = nn.Linear(2, 2)
    model.register_buffer("range", torch.zeros(0))
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=1, slow_momentum=0.5)
    model.range.resize_(3).fill_(float(lt.rank()))
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        model.range.fill_(float(lt.rank()))
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert model.range.tolist() == [(lt.size() - 1) / 2] * 3
    model.range = torch.full((5,), 7.0)
    folder = broadcast_object(transport(), str(tmp_path))
    lt.save(folder, optimizer)
    kept = copy.deepcopy(model.state_dict())
    model.range.zero_()
    lt.load(folder, optimizer)
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, kept[key]), key


@pytest.mark.filterwarnings("ignore")  # torch.ao's own, about what replaces it
def test_quantization_aware_training_keeps_all_ranks_equal() -> None:
    quantization = pytest.importorskip("torch.ao.quantization")
    model = nn.Sequential(quantization.QuantStub(), nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    model.qconfig = quantization.get_default_qat_qconfig("x86")  # type: ignore[assignment]
    model = quantization.prepare_qat(model.train())
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=2, slow_momentum=0.5)
    generator = torch.Generator().manual_seed(lt.rank())
    for _ in range(6):
        optimizer.zero_grad()
        (model(torch.randn(4, 3, generator=generator)) ** 2).sum().backward()
        optimizer.step()
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point():
            for other in lt.allgather_object(tensor):
                assert torch.equal(other, tensor), name
