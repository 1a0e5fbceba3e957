"""Collectives without a gradient, in place or in the background, refuse tensors whose gradient they would lose."""

from typing import Any

import pytest
import torch

import lentando.torch as lt

IN_PLACE = [
    ("allreduce_", lt.allreduce_),
    ("allreduce_async_", lt.allreduce_async_),
    ("broadcast_", lambda tensor: lt.broadcast_(tensor, 0)),
    ("broadcast_async_", lambda tensor: lt.broadcast_async_(tensor, 0)),
]
IN_BACKGROUND = [
    ("allreduce_async", lt.allreduce_async),
    ("allgather_async", lt.allgather_async),
    ("broadcast_async", lambda tensor: lt.broadcast_async(tensor, 0)),
    ("alltoall_async", lt.alltoall_async),
    ("reducescatter_async", lt.reducescatter_async),
]


def result_of(found: Any) -> torch.Tensor:
    found = found.wait() if isinstance(found, lt.Handle) else found
    return found[0] if isinstance(found, tuple) else found


@pytest.mark.parametrize(("name", "call"), [*IN_PLACE, *IN_BACKGROUND])
def test_a_computed_tensor_that_requires_a_gradient_is_refused(name: str, call: Any) -> None:
    tensor = 3 * torch.ones(lt.size(), requires_grad=True)
    with pytest.raises(lt.ConfigurationError, match=rf"{name} was given .*\[{lt.size()}\].*detach\(\).*no_grad\(\)"):
        call(tensor)
    assert (tensor == 3).all()


@pytest.mark.parametrize(("name", "call"), IN_PLACE)
def test_a_parameter_is_changed_in_place(name: str, call: Any) -> None:
    parameter = torch.nn.Parameter(torch.ones(2) * (lt.rank() + 1))
    assert result_of(call(parameter)) is parameter
    assert (parameter == (1 if "broadcast" in name else (lt.size() + 1) / 2)).all()
    assert parameter.requires_grad


@pytest.mark.parametrize(("name", "call"), [*IN_PLACE, *IN_BACKGROUND])
def test_without_gradients_it_is_taken(name: str, call: Any) -> None:
    weights = torch.ones(lt.size(), requires_grad=True)
    assert (result_of(call((3 * weights).detach())) == 3).all()
    with torch.no_grad():
        assert (result_of(call(weights)) == 1).all()
    assert not result_of(call(torch.ones(lt.size()))).requires_grad


@pytest.mark.parametrize("call", [lt.allreduce, lt.reducescatter])
def test_a_minimum_has_no_gradient(call: Any) -> None:
    with pytest.raises(lt.ConfigurationError, match="op=Min has no gradient"):
        call(torch.ones(lt.size(), requires_grad=True), op=lt.Min)


def test_parameters_and_objects_that_require_gradients_are_taken() -> None:
    model = torch.nn.Linear(2, 1)
    lt.broadcast_parameters(model.named_parameters(), 0)
    lt.broadcast_parameters(model.parameters(), 0)
    assert torch.equal(lt.broadcast_object({"w": model.weight})["w"], model.weight)
    assert model.weight.requires_grad
