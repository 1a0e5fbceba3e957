"""Gradients averaged in buckets while the backward pass computes: the same training as without, whatever users do."""

import copy
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose
from torch import nn

import lentando.torch as lt
from lentando.comm import world

BUCKET_BYTES = 200
"""Some parameters in each."""


class Net(nn.Module):
    """Tied, frozen and unused parameters; ``sometimes`` is used when a batch says so. Order of use is not of layout."""

    def __init__(self) -> None:
        super().__init__()
        self.sometimes = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.unused = nn.Linear(3, 3)
        self.frozen = nn.Linear(4, 4)
        self.out = nn.Linear(4, 2)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, images: torch.Tensor, sometimes: bool = False) -> torch.Tensor:
        x = self.conv(images).relu().mean(dim=(2, 3))
        if sometimes:
            x = self.sometimes(x)
        result: torch.Tensor = self.out(self.tied(self.first(self.frozen(x)).tanh()))
        return result


def net() -> Net:
    """Whose sums are exact, so that they do not depend on who adds what first: see ``rounded``."""
    torch.manual_seed(0)
    return Net().double()


def wrap(model: nn.Module, overlap: bool | None, **options: Any) -> lt.DistributedOptimizer:
    base = lt.AllReduce(overlap=overlap, bucket_bytes=BUCKET_BYTES)
    sgd = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    return lt.DistributedOptimizer(sgd, model=model, base=base, **options)


def loss_of(model: nn.Module, step: int, sometimes: bool = False) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * lt.rank() + step)
    images, labels = torch.randn(6, 1, 5, 5, generator=generator), torch.randint(0, 2, (6,), generator=generator)
    return nn.functional.cross_entropy(model(images.double(), sometimes), labels)


def backward(model: nn.Module, step: int, sometimes: bool = False) -> None:
    loss_of(model, step, sometimes).backward()


def plain(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    backward(model, step)
    optimizer.step()


def twice(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    """The second pass finds buckets that have are sent."""
    backward(model, step)
    backward(model, 100 + step)
    optimizer.step()


def twice_on_one_rank(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    for _ in range(2 if lt.rank() == 0 else 1):
        backward(model, step)
    optimizer.step()


def accumulated(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    with optimizer.no_sync():
        backward(model, step)
        backward(model, 100 + step)
    backward(model, 200 + step)
    optimizer.step()


def never_out_of_no_sync(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    with optimizer.no_sync():
        backward(model, step)
        optimizer.step()


def used_on_some_ranks(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    backward(model, step, sometimes=lt.rank() % 2 == step % 2)
    optimizer.step()


def clipped(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    """Without ``synchronize``, a rank clips its own gradients."""
    backward(model, step)
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def clipped_on_one_rank(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    backward(model, step)
    if lt.rank() == lt.size() - 1:
        nn.utils.clip_grad_value_(model.parameters(), 0.01)
    optimizer.step()


def synchronized(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    """With it, the averaged ones."""
    backward(model, step)
    optimizer.synchronize()
    nn.utils.clip_grad_norm_(model.parameters(), 0.05)
    optimizer.step()


def replaced(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    backward(model, step)
    for parameter in model.parameters():
        if parameter.grad is not None:
            parameter.grad = parameter.grad * 0.5
    optimizer.step()


def dropped(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    backward(model, step)
    if lt.rank() == 0:
        model.get_parameter("out.bias").grad = None
    optimizer.step()


def kept(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    """Gradients are the averaged ones of the last step, zeroed in place."""
    optimizer.zero_grad(set_to_none=False)
    plain(model, optimizer, step)


def in_parts(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    """Two losses of one graph."""
    loss = loss_of(model, step)
    (0.25 * loss).backward(retain_graph=True)
    (0.75 * loss).backward()
    optimizer.step()


def by_closure(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        loss.backward()
        return loss

    optimizer.step(closure)


def abandoned(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    """A backward pass whose gradients are thrown away."""
    backward(model, 300 + step)
    optimizer.zero_grad()
    plain(model, optimizer, step)


def evaluated(model: nn.Module, optimizer: lt.DistributedOptimizer, step: int) -> None:
    """Collectives of others between the backward pass and the step."""
    backward(model, step)
    assert lt.allreduce(torch.ones(3), op=lt.Sum)[0] == lt.size()
    assert optimizer.consensus_distance() < 1e-12
    optimizer.step()


STEPS: list[Callable[[nn.Module, lt.DistributedOptimizer, int], None]] = [
    plain, twice, twice_on_one_rank, accumulated, never_out_of_no_sync, used_on_some_ranks, clipped,
    clipped_on_one_rank, synchronized, replaced, dropped, kept, in_parts, by_closure, abandoned, evaluated,
]  # fmt: skip


def equal_on_all_ranks(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        for other in lt.allgather_object(tensor.clone()):
            assert torch.equal(other, tensor), name


def assert_trained_alike(one: nn.Module, other: nn.Module) -> None:
    """Bit-identically on two ranks, where a sum has two terms; on more, buckets add each element in another order."""
    for name, tensor in one.state_dict().items():
        if lt.size() <= 2:
            assert torch.equal(tensor, other.state_dict()[name]), name
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.__name__)
def test_training_is_that_without_overlap(step: Any) -> None:
    models = net(), net()
    for model, overlap in zip(models, (True, False), strict=True):
        optimizer = wrap(model, overlap)
        for number in range(6):
            optimizer.zero_grad()
            step(model, optimizer, number)
    equal_on_all_ranks(models[0])
    assert_trained_alike(*models)


@pytest.mark.parametrize("chosen", [True, None])
def test_any_step_may_follow_any_other(chosen: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """With None, which overlaps between nodes, until too many steps change their gradients."""
    monkeypatch.setattr(world.transport(), "local_size", 1)
    order = np.random.default_rng(0).choice(len(STEPS), 60)
    models = net(), net()
    for model, overlap in zip(models, (chosen, False), strict=True):
        optimizer = wrap(model, overlap)
        for number, which in enumerate(order):
            optimizer.zero_grad()
            STEPS[which](model, optimizer, number)
    equal_on_all_ranks(models[0])
    assert_trained_alike(*models)


def buckets_of(optimizer: lt.DistributedOptimizer) -> Any:
    buckets = optimizer._replica.base.overlap.buckets
    assert buckets is not None
    return buckets


def halve(parameter: torch.Tensor) -> None:
    if parameter.grad is not None:
        parameter.grad.mul_(0.5)


def drop(parameter: torch.Tensor) -> None:
    parameter.grad = None


@pytest.mark.parametrize("change", [halve, drop])
def test_gradients_may_change_while_others_of_their_bucket_are_computed(change: Callable[[torch.Tensor], None]) -> None:
    """By hooks of the program, which come before those of the optimizer. The second gradient changes the first one."""
    models = net(), net()
    for model, overlap in zip(models, (True, False), strict=True):
        weight, bias = (model.get_parameter(name) for name in ("conv.weight", "conv.bias"))
        weight.register_post_accumulate_grad_hook(lambda _, bias=bias: change(bias))  # type: ignore[no-untyped-call]
        bias.register_post_accumulate_grad_hook(lambda _, weight=weight: change(weight))  # type: ignore[no-untyped-call]
        optimizer = wrap(model, overlap)
        for step in range(4):
            optimizer.zero_grad()
            backward(model, step)
            if overlap:
                assert buckets_of(optimizer).is_open("conv.weight") == (change is drop)  # what is not there is not sent
            optimizer.step()
    equal_on_all_ranks(models[0])
    assert_trained_alike(*models)


def test_buckets_are_sent_before_the_backward_pass_is_over() -> None:
    if lt.size() == 1:
        return
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(6)))
    optimizer = wrap(model, overlap=True)
    buckets = buckets_of(optimizer)
    assert len(buckets) > 3
    in_flight = []
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda _: in_flight.append(buckets.is_in_flight))
    model(torch.ones(2, 8)).sum().backward()
    assert in_flight[0] is False
    assert in_flight[4:] == [True] * 8
    optimizer.step()
    assert not buckets.is_in_flight


def test_two_models_take_turns() -> None:
    """A thread and a communicator each: whose buckets are full first does not matter."""
    models, references = [net(), net()], [net(), net()]
    for group, overlap in ((models, True), (references, False)):
        optimizers = [wrap(model, overlap) for model in group]
        for step in range(5):
            for number in (step % 2, 1 - step % 2):
                optimizers[number].zero_grad()
                backward(group[number], 10 * number + step)
            for optimizer in optimizers:
                optimizer.step()
    for model, other in zip(models, references, strict=True):
        assert_trained_alike(model, other)


def test_optimizers_that_are_gone_leave_the_model_alone() -> None:
    model = net()
    for _ in range(3):
        optimizer = wrap(model, overlap=True)
        backward(model, 0)
        optimizer.step()
        optimizer.zero_grad()
    copied = copy.deepcopy(model)
    del optimizer
    backward(model, 1)
    backward(copied, 1)
    for (name, one), other in zip(model.named_parameters(), copied.parameters(), strict=True):
        if one.requires_grad and one.grad is not None:
            assert other.grad is not None
            assert torch.equal(one.grad, other.grad), name


def test_uneven_data_are_joined() -> None:
    models = net(), net()
    for model, overlap in zip(models, (True, False), strict=True):
        optimizer = wrap(model, overlap)
        for epoch in range(2):
            with lt.join(optimizer):
                for step in range(3 + lt.rank()):
                    optimizer.zero_grad()
                    backward(model, 20 * epoch + step)
                    optimizer.step()
            optimizer.zero_grad()
            plain(model, optimizer, 10 + epoch)
    assert_trained_alike(*models)


def test_grad_scaler_finds_overflow_on_any_rank() -> None:
    models = net().float(), net().float()
    for model, overlap in zip(models, (True, False), strict=True):
        optimizer = wrap(model, overlap)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(4):
            optimizer.zero_grad()
            images = torch.full((2, 1, 5, 5), float("inf") if step == 1 and lt.rank() == 0 else 0.5)
            scaler.scale(model(images).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
    for parameter in models[0].parameters():
        assert torch.isfinite(parameter).all()
    for name, tensor in models[0].state_dict().items():
        torch.testing.assert_close(tensor, models[1].state_dict()[name])


@pytest.mark.skipif(lt.size() == 1, reason="a rank must be left")
def test_gradients_that_are_not_finite_are_named_or_left_out() -> None:
    model = net()
    optimizer = wrap(model, overlap=True)
    bad = float("nan") if lt.rank() == lt.size() - 1 else 1.0
    (bad * loss_of(model, 0)).backward()
    with pytest.raises(lt.NonFiniteError, match=f"rank {lt.size() - 1}: the gradient of"):
        optimizer.step()
    models = net(), net()
    for model, overlap in zip(models, (True, False), strict=True):
        optimizer = wrap(model, overlap, on_nonfinite="skip")
        for step in range(4):
            optimizer.zero_grad()
            ((bad if step == 2 else 1.0) * loss_of(model, step)).backward()
            optimizer.step()
    equal_on_all_ranks(models[0])
    assert_trained_alike(*models)


def test_channels_last_parameters_are_averaged_element_by_element() -> None:
    models = []
    for overlap in (True, False):
        torch.manual_seed(1)
        model = nn.Conv2d(3, 5, 3).double().to(memory_format=torch.channels_last)
        models.append(model)
        optimizer = wrap(model, overlap)
        for step in range(3):
            optimizer.zero_grad()
            generator = torch.Generator().manual_seed(10 * lt.rank() + step)
            model(torch.randn(2, 3, 6, 6, generator=generator).double()).square().mean().backward()
            optimizer.step()
    assert_trained_alike(*models)


def test_bytes_are_those_of_the_buckets() -> None:
    """Counted when they are waited for, control messages and all: a little more than without."""
    sent = []
    for overlap in (True, False):
        model = nn.Linear(500, 100)
        optimizer = lt.DistributedOptimizer(
            torch.optim.SGD(model.parameters(), lr=0.1), base=lt.AllReduce("ring", overlap, 50_000)
        )
        for step in range(4):
            optimizer.zero_grad()
            model(torch.full((2, 500), 1.0 + step)).sum().backward()
            optimizer.step()
        sent.append(optimizer.report()["bytes_sent"])
    assert sent[0] == pytest.approx(sent[1], rel=0.01)


@pytest.mark.skipif(lt.size() == 1, reason="one rank sends no gradients")
def test_sparse_gradients_are_refused() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = wrap(model, overlap=True)

    def train() -> None:
        model(torch.tensor([1])).sum().backward()  # raises at once, if gradients are sent
        optimizer.step()

    with pytest.raises(lt.ConfigurationError, match="sparse gradient"):
        train()


@pytest.mark.parametrize("bad", [0, -1, 2.5, True])
def test_impossible_buckets_are_refused(bad: Any) -> None:
    with pytest.raises(lt.ConfigurationError, match="bucket_bytes must be an integer > 0"):
        lt.AllReduce(bucket_bytes=bad)


def test_synchronous_sgd_in_buckets_is_the_reference() -> None:
    dimension = 13
    gradient = reference.quadratic(dimension)
    start = np.linspace(-1, 1, dimension)
    model = nn.Linear(dimension, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(start)[None])
    optimizer = wrap(model, overlap=True)
    for step in range(20):
        optimizer.zero_grad()
        own = torch.from_numpy(gradient(lt.rank(), step, model.weight.detach().numpy()[0]))
        (model.weight * own).sum().backward()
        optimizer.step()
    expected = reference.synchronous_sgd(lt.size(), 20, start, gradient, 0.05, momentum=0.9)
    assert_allclose(model.weight.detach().numpy()[0], expected, rtol=1e-12)
