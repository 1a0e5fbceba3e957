"""Whether gradients overlap with the backward pass where the user leaves that open, and what follows if they cannot."""

import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lentando.torch as lt
from lentando.comm import world
from lentando.comm.objects import broadcast_object

BUCKET_BYTES = 200


@pytest.fixture
def several_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks that take themselves for alone on their nodes; ``tests/torch/test_overlap_between_hosts.py`` has hosts."""
    monkeypatch.setattr(world.transport(), "local_size", 1)


@pytest.fixture
def given_up(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The reasons for which overlap was given up, on rank 0."""
    with caplog.at_level(logging.INFO, logger="lentando"):
        yield lambda: [text for text in (record.getMessage() for record in caplog.records) if "from now on" in text]


def net(sparse: bool = False) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.EmbeddingBag(9, 6, sparse=sparse, mode="sum"), nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)
    ).double()


def wrap(model: nn.Module, overlap: bool | None = None, **options: Any) -> lt.DistributedOptimizer:
    options.setdefault("base", lt.AllReduce(overlap=overlap, bucket_bytes=BUCKET_BYTES))
    return lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.05), model=model, **options)


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * lt.rank() + step)
    words, labels = torch.randint(0, 9, (6, 3), generator=generator), torch.randint(0, 2, (6,), generator=generator)
    return nn.functional.cross_entropy(model(words), labels)


def train(model: nn.Module, optimizer: lt.DistributedOptimizer, steps: range, **options: Any) -> None:
    """Steps of which those in ``changed`` find gradients other than those that were sent."""
    changed = options.get("changed", ())
    for step in steps:
        optimizer.zero_grad()
        loss = loss_of(model, step)
        (loss / 2 if step in changed else loss).backward()
        for parameter in model.parameters() if step in changed else ():
            assert parameter.grad is not None
            parameter.grad.mul_(2)
        optimizer.step()


def is_overlapped(optimizer: lt.DistributedOptimizer) -> bool:
    overlapped: bool = optimizer.report()["is_overlapped"]
    assert lt.allgather_object(overlapped) == [overlapped] * lt.size()
    return overlapped


def can_overlap() -> bool:
    """Whether this transport admits threads, so that gradients overlap where they are asked to."""
    return is_overlapped(wrap(net(), overlap=True))


def assert_trained_alike(one: nn.Module, other: nn.Module, bits: bool | None = None) -> None:
    """Bit-identically on two ranks, or as given."""
    for name, tensor in one.state_dict().items():
        if lt.size() <= 2 if bits is None else bits:
            assert torch.equal(tensor, other.state_dict()[name]), name
        torch.testing.assert_close(tensor, other.state_dict()[name], rtol=1e-12, atol=1e-13)


def test_gradients_do_not_overlap_on_one_node() -> None:
    if world.transport().local_size == lt.size():
        assert not is_overlapped(wrap(net(), base=lt.AllReduce()))


@pytest.mark.usefixtures("several_nodes")
def test_gradients_overlap_on_several_nodes_where_that_is_possible() -> None:
    assert is_overlapped(wrap(net(), base=lt.AllReduce())) == can_overlap()
    assert not is_overlapped(wrap(net(), overlap=False))
    for refused in ({"op": lt.Sum}, {"predivide_factor": 2.0}, {"wire_dtype": "bfloat16"}, {"wire_dtype": "int8"}):
        assert not is_overlapped(wrap(net(), base=lt.AllReduce(**refused)))


@pytest.mark.usefixtures("several_nodes")
def test_no_rank_overlaps_if_the_adapter_of_one_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    if lt.rank() == 0:
        monkeypatch.setattr("lentando.torch.model.TorchModel.fills_buckets", False)
    optimizer = wrap(model)
    assert not is_overlapped(optimizer)
    train(model, optimizer, range(2))


@pytest.mark.usefixtures("several_nodes")
def test_sparse_gradients_give_it_up(given_up: Callable[[], list[str]]) -> None:
    models = [net(sparse=True) for _ in range(2)]
    optimizers = [wrap(model, overlap) for model, overlap in zip(models, (None, False), strict=True)]
    could = is_overlapped(optimizers[0])
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, range(4))
    assert not is_overlapped(optimizers[0])
    assert_trained_alike(*models)
    assert len(given_up()) == (could and lt.rank() == 0)
    assert all("because a gradient is sparse" in reason for reason in given_up())


@pytest.mark.usefixtures("several_nodes")
def test_sparse_gradients_that_are_made_dense_give_it_up() -> None:
    models = [net(sparse=True) for _ in range(2)]
    for model, overlap in zip(models, (None, False), strict=True):
        optimizer = wrap(model, overlap, sparse_as_dense=True)
        train(model, optimizer, range(3))
        assert not is_overlapped(optimizer)
    assert_trained_alike(*models)


@pytest.mark.usefixtures("several_nodes")
def test_gradients_that_are_changed_again_and_again_give_it_up(given_up: Callable[[], list[str]]) -> None:
    model = net()
    optimizer = wrap(model)
    could = is_overlapped(optimizer)
    train(model, optimizer, range(2), changed=range(2))
    assert is_overlapped(optimizer) == could
    train(model, optimizer, range(2, 4), changed=range(2, 4))
    assert not is_overlapped(optimizer)
    assert len(given_up()) == (could and lt.rank() == 0)
    assert all("in 3 steps" in reason for reason in given_up())


@pytest.mark.usefixtures("several_nodes")
def test_gradients_that_are_changed_now_and_then_do_not() -> None:
    model = net()
    optimizer = wrap(model)
    could = is_overlapped(optimizer)
    train(model, optimizer, range(40), changed=range(7, 40, 8))
    assert is_overlapped(optimizer) == could


@pytest.mark.usefixtures("several_nodes")
def test_it_changes_no_bit_which_steps_overlap() -> None:
    models = [net() for _ in range(3)]
    for model, changed in zip(models, ((), (1, 4), range(12)), strict=True):
        train(model, wrap(model), range(12), changed=changed)
    for model in models[1:]:
        assert_trained_alike(models[0], model, bits=True)


@pytest.mark.parametrize("overlap", [True, False, None])
@pytest.mark.usefixtures("several_nodes")
def test_join_completes_what_a_backward_pass_of_some_ranks_has_begun(overlap: bool | None) -> None:
    model, other = net(), net()
    for each, choice in ((model, overlap), (other, False)):
        optimizer = wrap(each, choice)
        train(each, optimizer, range(2))
        for epoch in range(2):
            optimizer.zero_grad()
            if lt.rank() % 2 == 0:
                loss_of(each, 50).backward()
            with lt.join(optimizer):
                train(each, optimizer, range(10, 12 + lt.rank()))
            train(each, optimizer, range(20 + epoch, 21 + epoch))
    assert_trained_alike(model, other)


@pytest.mark.parametrize("passes", [1, 2])
@pytest.mark.filterwarnings("ignore:Using backward:UserWarning")  # once in a process
@pytest.mark.usefixtures("several_nodes")
def test_gradients_may_have_a_graph(passes: int) -> None:
    models = [net() for _ in range(2)]
    for model, overlap in zip(models, (None, False), strict=True):
        optimizer = wrap(model, overlap)
        for step in range(3):
            optimizer.zero_grad()
            for number in range(passes):
                loss_of(model, 10 * number + step).backward(create_graph=True)
            optimizer.step()
            assert not any(
                parameter.grad.requires_grad for parameter in model.parameters() if parameter.grad is not None
            )
    assert_trained_alike(*models)


@pytest.mark.usefixtures("several_nodes")
def test_parameters_may_be_frozen_after_a_backward_pass_of_some_ranks() -> None:
    models = [net() for _ in range(2)]
    for model, overlap in zip(models, (None, False), strict=True):
        optimizer = wrap(model, overlap)
        train(model, optimizer, range(2))
        if lt.rank() == 0:
            loss_of(model, 9).backward()
        model[1].weight.requires_grad_(False)
        model[1].weight.grad = None
        train(model, optimizer, range(2, 6))
    assert_trained_alike(*models)


CHOICES = [
    (lt.AllReduce(overlap=False), lt.AllReduce()),
    (lt.AllReduce(), lt.AllReduce(overlap=False)),
    (lt.AllReduce(overlap=True), lt.AllReduce(bucket_bytes=BUCKET_BYTES)),
]


@pytest.mark.parametrize(("before", "after"), CHOICES)
@pytest.mark.usefixtures("several_nodes")
def test_checkpoints_resume_with_another_choice(before: lt.AllReduce, after: lt.AllReduce, tmp_path: Path) -> None:
    folder = broadcast_object(world.transport(), str(tmp_path / "checkpoint"))
    whole, saved, resumed = net(), net(), net()
    train(whole, wrap(whole, base=before), range(6))
    optimizer = wrap(saved, base=before)
    train(saved, optimizer, range(3))
    lt.save(folder, optimizer)
    optimizer = wrap(resumed, base=after)
    lt.load(folder, optimizer)
    train(resumed, optimizer, range(3, 6))
    assert_trained_alike(whole, resumed)
    world.transport().barrier()


@pytest.mark.usefixtures("several_nodes")
def test_ranks_compare_the_choice() -> None:
    if lt.size() == 1:
        return
    with pytest.raises(lt.MismatchError, match=r"base\.overlap: .*True"):
        wrap(net(), overlap=True if lt.rank() == 0 else None)


@pytest.mark.usefixtures("several_nodes")
def test_models_of_many_dtypes_overlap() -> None:
    model = nn.ModuleDict({"one": nn.Linear(5, 3).double(), "other": nn.Linear(5, 3)})
    reference = nn.ModuleDict({"one": nn.Linear(5, 3).double(), "other": nn.Linear(5, 3)})
    reference.load_state_dict(model.state_dict())
    for each, overlap in ((model, None), (reference, False)):
        optimizer = wrap(each, overlap)
        for step in range(3):
            optimizer.zero_grad()
            inputs = torch.full((2, 5), 1.0 + step + lt.rank())
            (each["one"](inputs.double()).sum() + each["other"](inputs).sum()).backward()
            optimizer.step()
    for one, other in zip(model.parameters(), reference.parameters(), strict=True):
        np.testing.assert_allclose(one.detach().numpy(), other.detach().numpy(), rtol=1e-6)
