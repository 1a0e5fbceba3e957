"""Collectives are not differentiable: what would lose its gradient is refused."""

from typing import Any

import pytest
import torch

import lentando.torch as lt

CALLS = [
    ("allreduce", lt.allreduce),
    ("allreduce_", lt.allreduce_),
    ("allgather", lt.allgather),
    ("broadcast", lambda tensor: lt.broadcast(tensor, 0)),
    ("broadcast_", lambda tensor: lt.broadcast_(tensor, 0)),
]


@pytest.mark.parametrize(("name", "call"), CALLS)
@pytest.mark.parametrize("is_leaf", [True, False])
def test_tensor_that_requires_a_gradient_is_refused(name: str, call: Any, is_leaf: bool) -> None:
    weights = torch.ones(2, requires_grad=True)
    tensor = weights if is_leaf else 3 * weights
    with pytest.raises(lt.ConfigurationError, match=rf"{name} was given .*\[2\].*detach\(\).*no_grad\(\)"):
        call(tensor)
    assert tensor.tolist() == weights.tolist() if is_leaf else [3.0, 3.0]


@pytest.mark.parametrize(("name", "call"), CALLS)
def test_without_gradients_it_is_taken(name: str, call: Any) -> None:
    weights = torch.ones(2, requires_grad=True)
    assert (call((3 * weights).detach()) == 3).all()
    with torch.no_grad():
        assert (call(weights) == 1).all()
    assert not call(torch.ones(2)).requires_grad


def test_parameters_and_objects_that_require_gradients_are_taken() -> None:
    model = torch.nn.Linear(2, 1)
    lt.broadcast_parameters(model.named_parameters(), 0)
    assert torch.equal(lt.broadcast_object({"w": model.weight})["w"], model.weight)
    assert model.weight.requires_grad
