"""The PyTorch adapter where the transport takes device arrays. The tensors are the CPU's, and stand for a GPU's."""

import copy
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import device_arrays
import pytest
import torch
from device_arrays import DeviceArray, waits
from matching_nccl import run_ranks_on_devices
from torch import nn

import lentando.torch as lt
from lentando.comm.errors import ConfigurationError
from lentando.comm.testing import run_ranks
from lentando.comm.transport import Array, Transport
from lentando.comm.world import simulated_rank
from lentando.torch import flat_memory
from lentando.torch import model as module
from lentando.torch.convert import as_array, share_stream
from lentando.torch.flat_memory import placement_on

METHODS: dict[str, dict[str, Any]] = {
    "allreduce": {"base": lt.AllReduce()},
    "slowmo": {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(0.8, 0.5), "period": 3, "base_buffers": "average"},
    "sgp": {"base": lt.SGP(), "outer": lt.SlowMomentum(), "period": 4},
    "osgp": {"base": lt.OSGP(deterministic=True), "period": 4},
}
SIZE = 3


class Net(nn.Module):
    """BatchNorm, a frozen and an unused parameter, two dtypes, two memory orders."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(3)
        self.frozen = nn.Linear(3, 3).requires_grad_(False)
        self.unused = nn.Linear(2, 2)
        self.out = nn.Linear(3, 1).to(torch.bfloat16)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        features = self.frozen(self.norm(self.conv(images)).mean(dim=(2, 3)))
        result: torch.Tensor = self.out(features.to(torch.bfloat16))
        return result


torch.manual_seed(0)
NET = Net()


def on_device(tensor: torch.Tensor) -> Array:
    return DeviceArray(as_array(tensor))  # type: ignore[return-value]


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Flat tensors of the CPU are given to the transport as a GPU's are; when the stream was shared."""
    calls: list[torch.device] = []
    monkeypatch.setattr(module, "placement_on", lambda device, takes, staged: "device" if takes else "host")
    monkeypatch.setattr(flat_memory, "as_device_array", on_device)
    monkeypatch.setattr(flat_memory, "share_stream", calls.append)
    return calls


def wrap(model: nn.Module, method: str) -> lt.DistributedOptimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return lt.DistributedOptimizer(sgd, model=model, **METHODS[method])


def train(optimizer: lt.DistributedOptimizer, model: nn.Module, first: int, last: int) -> None:
    for step in range(first, last):
        images = torch.randn(4, 2, 5, 5, generator=torch.Generator().manual_seed(100 * step + lt.rank()))
        optimizer.zero_grad()
        loss = (model(images).float() - images.mean(dim=(1, 2, 3))[:, None]).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def on_each(function: Callable[[], Any]) -> Callable[[Transport], Any]:
    def run(transport: Transport) -> Any:
        with simulated_rank(transport):
            return function()

    return run


def bits(model: nn.Module) -> list[bytes]:
    return [tensor.contiguous().view(-1).view(torch.uint8).numpy().tobytes() for tensor in model.state_dict().values()]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_model_on_a_device_trains_as_one_in_host_memory_bit_identically(
    method: str, shared: list[torch.device]
) -> None:
    def trained() -> tuple[list[bytes], bool]:
        model = copy.deepcopy(NET)
        optimizer = wrap(model, method)
        train(optimizer, model, 0, 9)
        buffers = optimizer._model.buffers
        for memory, buffer in zip(optimizer._model._memory, buffers, strict=True):
            flat = on_device(memory.flat)
            assert not isinstance(buffer.array, DeviceArray) or bits_of(buffer.array) == bits_of(flat)
        return bits(model), isinstance(buffers[0].array, DeviceArray)

    found = run_ranks_on_devices(SIZE, on_each(trained))
    assert all(is_device for _, is_device in found)
    assert shared
    expected = run_ranks(SIZE, on_each(trained))
    assert not any(is_device for _, is_device in expected)
    assert [model for model, _ in found] == [model for model, _ in expected]


def bits_of(array: Any) -> bytes:
    return device_arrays.asnumpy(array).tobytes()


@pytest.mark.parametrize("method", ["slowmo", "osgp"])
def test_nothing_is_read_back_between_outer_steps(method: str, shared: list[torch.device]) -> None:
    def counts() -> list[int]:
        model = copy.deepcopy(NET)
        optimizer = wrap(model, method)
        found = []
        for step in range(12):
            before = waits()
            train(optimizer, model, step, step + 1)
            found.append(waits() - before)
        return found

    period = METHODS[method]["period"]
    for found in run_ranks_on_devices(SIZE, on_each(counts)):
        between = [count for step, count in enumerate(found) if step and (step + 1) % period]
        assert between == [0] * len(between)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_checkpoint_of_a_device_is_that_of_host_memory(method: str, shared: list[torch.device], tmp_path: Path) -> None:
    """Saved on a device, and continued on one and in host memory, bit-identically; and the other way round."""

    def saved(folder: Path) -> Callable[[], list[bytes]]:
        def run() -> list[bytes]:
            model = copy.deepcopy(NET)
            optimizer = wrap(model, method)
            train(optimizer, model, 0, 5)
            lt.save(folder, optimizer)
            train(optimizer, model, 5, 9)
            return bits(model)

        return run

    def resumed(folder: Path) -> Callable[[], list[bytes]]:
        def run() -> list[bytes]:
            model = copy.deepcopy(NET)
            optimizer = wrap(model, method)
            lt.load(folder, optimizer)
            train(optimizer, model, 5, 9)
            return bits(model)

        return run

    run_on = {"device": run_ranks_on_devices, "host": run_ranks}
    uninterrupted = {place: run(SIZE, on_each(saved(tmp_path / place))) for place, run in run_on.items()}
    assert uninterrupted["device"] == uninterrupted["host"]
    for source in run_on:
        for place, run in run_on.items():
            continued = run(SIZE, on_each(resumed(tmp_path / source)))
            # The shards of NCCL's halves and of the ring are different ones: loading cuts them again.
            assert continued == uninterrupted["host"], (source, place)


class CupyStreams:
    """What ``share_stream`` asks of CuPy: which stream is current, and to make another so."""

    def __init__(self) -> None:
        self.current = 0
        self.device = -1
        self.wrapped: list[int] = []
        self.Stream = SimpleNamespace(null=self._stream(0))

    def _stream(self, pointer: int) -> Any:
        return SimpleNamespace(ptr=pointer, use=lambda: setattr(self, "current", pointer))

    def ExternalStream(self, pointer: int, device: int) -> Any:  # noqa: N802 - CuPy's name
        warnings.warn("deprecated", DeprecationWarning, stacklevel=2)
        self.wrapped.append(pointer)
        return self._stream(pointer)

    def Device(self, device: int) -> Any:  # noqa: N802 - CuPy's name
        return SimpleNamespace(use=lambda: setattr(self, "device", device))

    def get_current_stream(self) -> Any:
        return self._stream(self.current)


def test_cupy_follows_pytorchs_current_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    streams, now = CupyStreams(), SimpleNamespace(cuda_stream=0)
    monkeypatch.setitem(sys.modules, "cupy", SimpleNamespace(cuda=streams))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: now)
    for pointer, wrapped in ((0, []), (7, [7]), (7, [7]), (0, [7]), (9, [7, 9])):
        now.cuda_stream = pointer
        share_stream(torch.device("cuda", 1))
        assert (streams.current, streams.device, streams.wrapped) == (pointer, 1, wrapped)
    with pytest.raises(ConfigurationError, match="on cuda:0, but PyTorch's current device is cuda:1: .*set_device"):
        share_stream(torch.device("cuda", 0))


def test_place_follows_from_device_and_transport() -> None:
    cpu, gpu, other = torch.device("cpu"), torch.device("cuda", 0), torch.device("mps")
    assert [placement_on(cpu, takes, False) for takes in (False, True)] == ["host", "host"]
    assert [placement_on(gpu, takes, False) for takes in (False, True)] == ["staged", "device"]
    assert [placement_on(other, takes, False) for takes in (False, True)] == ["staged", "staged"]
    assert placement_on(cpu, True, True) == "staged"
