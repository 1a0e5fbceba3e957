"""The adapter reads and replaces memory of tensors in one file, ``local_tensors.py``."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import lentando.torch
from lentando.torch import local_tensors

ADAPTER = Path(lentando.torch.__path__[0])
CALLS = {"data_ptr", "untyped_storage", "view_as_complex", "view_as_real", "to_local"}
ASSIGNED = {"data", "grad"}


def accesses(source: str) -> Iterator[str]:
    """What a module does with the memory of tensors: calls, and assignments to attributes."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute):
            if node.attr in CALLS:
                yield node.attr
            elif node.attr in ASSIGNED and isinstance(node.ctx, ast.Store):
                yield f"{node.attr} ="


def test_no_other_file_accesses_memory() -> None:
    found = {path.name: set(accesses(path.read_text())) for path in ADAPTER.glob("*.py")}
    assert found.pop("local_tensors.py") == {"data_ptr", "view_as_complex", "view_as_real", "data =", "grad ="}
    assert {name: kinds for name, kinds in found.items() if kinds} == {}


def test_every_access_is_found() -> None:
    source = "a.data = b\nc.grad = None\nd.data_ptr()\ntorch.view_as_real(e)\nf.grad.item()\ng.data.shape"
    assert sorted(accesses(source)) == ["data =", "data_ptr", "grad =", "view_as_real"]


def test_tensors_are_identified_by_their_memory() -> None:
    tensor = torch.arange(4.0)
    assert local_tensors.identity(tensor) == local_tensors.identity(tensor.detach().view(2, 2))
    assert local_tensors.identity(tensor) != local_tensors.identity(tensor[:2])
    assert local_tensors.identity(tensor) != local_tensors.identity(tensor.clone())


def test_tensors_without_memory_are_identified_by_the_object() -> None:
    first, second = torch.zeros(3).to_sparse(), torch.zeros(3).to_sparse()
    assert local_tensors.address(second) == 0
    assert local_tensors.identity(second) == local_tensors.identity(second)
    assert local_tensors.identity(first) != local_tensors.identity(second)


@pytest.mark.parametrize("has_gradient", [True, False])
def test_a_gradient_is_an_alias_of_its_memory(has_gradient: bool) -> None:
    parameter, memory = torch.nn.Parameter(torch.zeros(2)), torch.ones(2)
    local_tensors.set_gradient(parameter, memory if has_gradient else None)
    if not has_gradient:
        assert parameter.grad is None
        return
    assert parameter.grad is not memory
    assert local_tensors.is_same_memory(parameter.grad, memory)


def test_several_gradients_are_aliases_of_their_memory() -> None:
    parameters = [torch.nn.Parameter(torch.zeros(length)) for length in (2, 3)]
    memory = [torch.ones(2), torch.full((3,), 2.0)]
    local_tensors.set_gradients(parameters, memory)
    for parameter, tensor in zip(parameters, memory, strict=True):
        assert parameter.grad is not None
        assert parameter.grad is not tensor
        assert local_tensors.is_same_memory(parameter.grad, tensor)
        parameter.grad.resize_(1)
        assert len(tensor) > 1


def test_a_parameter_keeps_its_values_when_it_moves() -> None:
    parameter, memory = torch.nn.Parameter(torch.arange(3.0)), torch.zeros(3)
    assert local_tensors.use_memory(parameter, memory) == memory.data_ptr()
    assert parameter.tolist() == memory.tolist() == [0, 1, 2]
    local_tensors.release_memory(parameter)
    memory.zero_()
    assert parameter.tolist() == [0, 1, 2]
