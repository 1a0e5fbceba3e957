"""What is only sent, saved or taken over can be resized afterwards, and so can the results."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt
from lentando.comm.objects import broadcast_object
from lentando.comm.world import transport
from lentando.torch.convert import as_array, as_tensor

DTYPES = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e4m3fn]

CALLS: dict[str, Callable[[torch.Tensor], Any]] = {
    "broadcast_": lambda tensor: lt.broadcast_(tensor, 0),
    "broadcast": lambda tensor: lt.broadcast(tensor, 0),
    "allreduce": lambda tensor: lt.allreduce(tensor.float()),
    "allreduce_": lambda tensor: lt.allreduce_(tensor, op=lt.Sum),
    "allgather": lt.allgather,
    "broadcast_parameters": lambda tensor: lt.broadcast_parameters({"x": tensor}, 0),
    "broadcast_object": lambda tensor: lt.broadcast_object([tensor]),
    "allgather_object": lambda tensor: lt.allgather_object({"x": tensor}),
}


def check_resizable(value: Any) -> None:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            check_resizable(item)
    if isinstance(value, torch.Tensor):
        value.detach().resize_(50)


@pytest.mark.parametrize("name", CALLS)
def test_collectives_leave_their_tensor_and_their_result_resizable(name: str) -> None:
    tensor = torch.ones(3)
    result = CALLS[name](tensor)
    check_resizable(tensor)
    check_resizable(result)


def test_what_an_optimizer_keeps_stays_resizable(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    model[2].requires_grad_(False)
    model.register_buffer("count", torch.zeros(3, dtype=torch.int64))
    model.register_buffer("is_used", torch.zeros(2, dtype=torch.bool))
    base = torch.optim.Adam(model.parameters(), lr=0.1)
    optimizer = lt.SlowMo(base, model=model, period=2, base_buffers="average")
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(4, 3)).sum().backward()
        optimizer.step()
    extra = {"x": torch.ones(2)}
    folder = broadcast_object(transport(), str(tmp_path))
    lt.save(folder, optimizer, extra)
    loaded = lt.load(folder, optimizer)
    lt.broadcast_optimizer_state(optimizer, 0)
    state = optimizer.state_dict()
    check_resizable(extra)
    check_resizable(loaded)
    check_resizable(state["lentando"])
    check_resizable(base.state_dict()["state"])
    check_resizable(dict(model.named_buffers()))
    check_resizable(list(model[2].parameters()))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_arrays_and_tensors_share_memory_in_both_directions(dtype: torch.dtype) -> None:
    tensor = torch.arange(12).reshape(3, 4).to(dtype).t()
    array = as_array(tensor)
    assert array.shape == (4, 3)
    assert array.dtype.name == str(dtype).removeprefix("torch.")
    assert array.astype("float32").tolist() == tensor.float().tolist()
    array[1, 2] = 0
    assert tensor[1, 2].float() == 0
    back = as_tensor(array)
    assert back.dtype == dtype
    assert back.data_ptr() == tensor.data_ptr()
    assert as_array(torch.zeros(0, 3, dtype=dtype)).shape == (0, 3)
    assert as_array(torch.zeros((), dtype=dtype)).shape == ()


def test_an_array_keeps_the_memory_of_its_tensor() -> None:
    array = as_array(torch.full((1000, 1000), 7.0))
    others = [torch.zeros(1000, 1000) for _ in range(4)]
    assert (array == 7).all(), others


def test_what_is_not_computed_yet_is_sent_as_it_is_read() -> None:
    tensor = torch.complex(torch.ones(3), torch.full((3,), float(lt.rank() + 1))).conj()
    assert tensor.is_conj()
    lt.broadcast_(tensor, lt.size() - 1)
    assert tensor.tolist() == [complex(1, -lt.size())] * 3
    assert lt.allgather(tensor.imag)[0] == -lt.size()


WITHOUT_PLAIN_MEMORY: dict[str, Callable[[], torch.Tensor]] = {
    "sparse": lambda: torch.eye(3).to_sparse(),
    "meta": lambda: torch.zeros(3, device="meta"),
    "quantized": lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 0, torch.qint8),
}


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions")
@pytest.mark.parametrize("kind", WITHOUT_PLAIN_MEMORY)
def test_tensors_without_plain_memory_are_refused_in_a_sentence(kind: str) -> None:
    with pytest.raises(lt.ConfigurationError, match=kind):
        as_array(WITHOUT_PLAIN_MEMORY[kind]())
