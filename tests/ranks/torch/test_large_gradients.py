"""Large gradients, which are averaged where the backward pass has put them if that is faster."""

from collections.abc import Callable

import pytest
import torch
from torch import nn

import lentando.torch as lt
from lentando.optimizers.rules import whole_gradients

several = pytest.mark.skipif(lt.size() == 1, reason="nothing is averaged")


@pytest.fixture(autouse=True)
def _cores_for_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where ranks share cores, gradients are copied."""
    monkeypatch.setattr(whole_gradients.os, "cpu_count", lambda: 64)


class Net(nn.Module):
    """Two large parameters and four small ones."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(260, 300), nn.Linear(300, 260)
        self.convolution = nn.Conv2d(3, 4, 3)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return self.second(torch.relu(self.first(inputs))).square().mean() + self.convolution.weight.square().mean()


def wrapped(model: nn.Module, **options: object) -> lt.DistributedOptimizer:
    return lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model, **options)  # type: ignore[arg-type]


def backward(model: nn.Module, step: int = 0) -> list[torch.Tensor | None]:
    """A backward pass on this rank's batch; returns copies of the gradients."""
    inputs = torch.randn(4, 260, generator=torch.Generator().manual_seed(100 * step + lt.rank()))
    model(inputs).backward()
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_averaged(model: nn.Module, own: list[torch.Tensor | None], divisor: int | None = None) -> None:
    for parameter, gradient in zip(model.parameters(), own, strict=True):
        by_rank = lt.allgather_object(gradient)
        present = [torch.zeros_like(parameter) if each is None else each for each in by_rank]
        if all(each is None for each in by_rank):
            assert parameter.grad is None
            continue
        assert parameter.grad is not None
        torch.testing.assert_close(parameter.grad, sum(present) / (divisor or lt.size()), rtol=1e-5, atol=1e-7)
        assert all(torch.equal(other, parameter.grad) for other in lt.allgather_object(parameter.grad))


def stay(model: nn.Module, optimizer: lt.DistributedOptimizer) -> int:
    """Number of gradients that stayed where they were in the last step."""
    homes = optimizer._model.flat_gradients.views
    given = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return sum(gradient.data_ptr() != homes[name].data_ptr() for name, gradient in given.items())


def test_they_stay_where_they_are_and_are_averaged() -> None:
    model = Net()
    optimizer = wrapped(model)
    for step in range(4):
        optimizer.zero_grad()
        own = backward(model, step)
        assert model.first.weight.grad is not None
        before = model.first.weight.grad.data_ptr()
        optimizer.step()
        assert_averaged(model, own)
        if optimizer._replica.gradients.may_stay:  # over transports with shared memory
            assert stay(model, optimizer) == 2
            assert model.first.weight.grad.data_ptr() == before


def test_sums_are_formed_in_place_too() -> None:
    model = Net()
    optimizer = wrapped(model, op=lt.Sum)
    own = backward(model)
    optimizer.step()
    assert_averaged(model, own, divisor=1)


def zeroed_in_place(model: nn.Module, optimizer: lt.DistributedOptimizer) -> None:
    """After a step, the gradients of the first rank are zeroed where they are, and the others have none."""
    optimizer.zero_grad()
    backward(model)
    optimizer.step()
    optimizer.zero_grad(set_to_none=lt.rank() != 0)


def without_gradient(model: nn.Module, optimizer: lt.DistributedOptimizer) -> None:
    """The last rank has no gradient of a large parameter."""
    backward(model)
    if lt.rank() == lt.size() - 1:
        model.first.weight.grad = None  # type: ignore[union-attr]


def transposed(model: nn.Module, optimizer: lt.DistributedOptimizer) -> None:
    """The first rank's gradient has another order of elements."""
    backward(model)
    if lt.rank() == 0:
        weight = model.first.weight  # type: ignore[union-attr]
        weight.grad = weight.grad.t().contiguous().t()  # type: ignore[union-attr, operator, assignment]


def with_a_graph(model: nn.Module, optimizer: lt.DistributedOptimizer) -> None:
    """As a second derivative needs it."""
    gradients = torch.autograd.grad(model(torch.ones(1, 260)), list(model.parameters())[:4], create_graph=True)
    for parameter, gradient in zip(model.parameters(), gradients, strict=False):
        parameter.grad = gradient


def in_flat_memory(model: nn.Module, optimizer: lt.DistributedOptimizer) -> None:
    """Gradients that were copied before, of the step before."""
    optimizer._model.flat_gradients.gather()
    optimizer._model.flat_gradients.scatter()
    backward(model)


@pytest.mark.parametrize("prepare", [zeroed_in_place, without_gradient, transposed, with_a_graph, in_flat_memory])
def test_ranks_whose_gradients_cannot_stay_copy_them(
    prepare: Callable[[nn.Module, lt.DistributedOptimizer], None],
) -> None:
    model = Net()
    optimizer = wrapped(model)
    prepare(model, optimizer)
    own = [None if p.grad is None else p.grad.detach().clone() for p in model.parameters()]
    optimizer.step()
    assert_averaged(model, own)
    optimizer.zero_grad()
    own = backward(model, 1)
    optimizer.step()
    assert_averaged(model, own)


def test_a_gradient_that_two_parameters_share_is_averaged_once() -> None:
    model = Net()
    optimizer = wrapped(model, op=lt.Sum)
    backward(model)
    shared = torch.full((260, 300), float(lt.rank() + 1))
    model.second.weight.grad = shared
    model.first.weight.grad = shared.view(300, 260)
    optimizer.step()
    total = sum(range(1, lt.size() + 1))
    assert (model.first.weight.grad == total).all()
    assert (model.second.weight.grad == total).all()


def test_a_gradient_in_memory_of_another_use_is_copied() -> None:
    """One in the flat memory, at the place of another gradient; and one that is the parameter itself."""
    model = Net()
    optimizer = wrapped(model, op=lt.Sum)
    home = optimizer._model.flat_gradients.views["first.weight"]
    home.fill_(float(lt.rank() + 1))
    model.first.weight.grad = home.detach()
    model.second.weight.grad = home.detach().view(260, 300)
    optimizer.step()
    total = sum(range(1, lt.size() + 1))
    assert (model.first.weight.grad == total).all()
    assert (model.second.weight.grad == total).all()
    before = model.first.weight.detach().clone()
    model.first.weight.grad = model.first.weight.detach()
    optimizer._gradients.average(None, False)
    assert torch.equal(model.first.weight, before)


def test_large_gradients_of_two_dtypes() -> None:
    """Those of 16 bits are fewer bytes than what is staged."""
    first, second = nn.Linear(300, 300), nn.Linear(300, 300).to(torch.bfloat16)
    model = nn.ModuleList([first, second])
    optimizer = wrapped(model)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(2 * lt.rank()))
    optimizer.step()
    for parameter in model.parameters():
        assert parameter.grad is not None
        assert (parameter.grad == lt.size() - 1).all()


def test_a_rank_without_batches_takes_the_gradients_of_the_others() -> None:
    """Although those of its own last step stayed where they were."""
    model = Net()
    optimizer = wrapped(model)
    backward(model)
    optimizer.step()
    with lt.join(optimizer):
        for step in range(1, 1 + 2 * lt.rank()):
            optimizer.zero_grad()
            backward(model, step)
            optimizer.step()
    for parameter in model.parameters():
        assert all(torch.equal(other, parameter) for other in lt.allgather_object(parameter.detach()))


@several
@pytest.mark.parametrize("name", ["first.weight", "second.bias"])
def test_a_value_that_is_not_finite_is_named_on_every_rank(name: str) -> None:
    model = Net()
    optimizer = wrapped(model)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    backward(model)
    if lt.rank() == lt.size() - 1:
        gradient = model.get_parameter(name).grad
        assert gradient is not None
        gradient.view(-1)[-1] = float("inf")
    expected = f"so the step is not taken.* rank {lt.size() - 1}: the gradient of '{name}' is not finite"
    with pytest.raises(lt.NonFiniteError, match=expected):
        optimizer.step()
    assert all(torch.equal(mine, earlier) for mine, earlier in zip(model.parameters(), before, strict=True))
    optimizer.zero_grad()
    own = backward(model, 1)
    optimizer.step()
    assert_averaged(model, own)


@several
def test_on_request_values_that_are_not_finite_are_left_out() -> None:
    model = Net()
    optimizer = wrapped(model, on_nonfinite="skip")
    own = backward(model)
    if lt.rank() == 0:
        assert model.first.weight.grad is not None
        model.first.weight.grad[0, 0] = float("nan")
        own = [None for _ in own]
    optimizer.step()
    assert stay(model, optimizer) == 0
    assert_averaged(model, own, divisor=lt.size() - 1)


@several
def test_a_gradient_that_is_sparse_on_some_ranks_only_is_refused_on_every_rank() -> None:
    model = nn.Embedding(300, 260, sparse=lt.rank() == 0)
    optimizer = wrapped(model)
    model(torch.tensor([1, 2])).sum().backward()
    if not optimizer._replica.gradients.may_stay:
        optimizer.step()
        return
    with pytest.raises(lt.ConfigurationError, match="'weight' is sparse on some ranks and dense on others"):
        optimizer.step()
