"""Ranks of PyTorch whose values are not finite: named by parameter on every rank, or left out and restored."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

several = pytest.mark.skipif(lt.size() == 1, reason="a rank must be left")
CULPRIT = lt.size() - 1


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def sgd(model: nn.Module) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)


def train(optimizer: Any, model: nn.Module, steps: int, first: int = 0, bad: float | None = None, at: int = -1) -> None:
    """With ``bad``, the culprit's batch of step ``at`` is that number."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * lt.rank() + step)
        x, labels = torch.randn(6, 4, generator=generator), torch.randint(0, 2, (6,), generator=generator)
        if step == at and lt.rank() == CULPRIT and bad is not None:
            x[0, 0] = bad
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), labels)
        loss.backward()
        optimizer.step(loss=loss)


def message_on_every_rank(error: "pytest.ExceptionInfo[lt.NonFiniteError]") -> str:
    (message,) = set(lt.allgather_object(str(error.value).partition("\n")[0]))
    return message


def assert_equal_and_finite(model: nn.Module) -> None:
    for name, tensor in model.state_dict().items():
        assert torch.isfinite(tensor).all(), name
        for other in lt.allgather_object(tensor):
            assert torch.equal(other, tensor), name


def test_allreduce_names_gradient_and_loss_and_changes_no_parameter() -> None:
    model = net()
    optimizer = lt.DistributedOptimizer(sgd(model), model=model)
    train(optimizer, model, 2)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(lt.NonFiniteError) as error:
        train(optimizer, model, 1, first=2, bad=float("nan"), at=2)
    message = message_on_every_rank(error)
    assert "average of gradients of inner step 3" in message
    assert f"rank {CULPRIT}: the gradient of '0.weight' is not finite, its loss is not finite" in message
    assert all(torch.equal(mine, earlier) for mine, earlier in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
def test_gradients_of_every_dtype_are_looked_at(dtype: torch.dtype, bad: float) -> None:
    model = nn.Linear(3, 2, bias=False).to(dtype)
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    model.weight.grad = torch.full_like(model.weight, torch.finfo(dtype).max)
    optimizer.step()  # large is not infinite
    with torch.no_grad():
        model.weight.zero_()
    model.weight.grad = torch.zeros_like(model.weight)
    if lt.rank() == CULPRIT:
        model.weight.grad[1, 2] = bad
    with pytest.raises(lt.NonFiniteError, match=f"rank {CULPRIT}: the gradient of 'weight' is not finite"):
        optimizer.step()


def test_outer_step_names_parameter_and_loss() -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model, period=3)
    with pytest.raises(lt.NonFiniteError) as error:
        train(optimizer, model, 3, bad=float("inf"), at=1)
    message = message_on_every_rank(error)
    assert f"rank {CULPRIT}: '0.weight' is not finite, its loss is not finite" in message
    assert "outer step 1" in message


@several
@pytest.mark.parametrize("base", [lt.LocalSGD(), lt.SGP(), lt.OSGP(), lt.DPSGD()], ids=str)
def test_rank_is_restored_with_a_new_optimizer(base: Any) -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model, base=base, period=4, base_buffers="maintain", on_nonfinite="skip")
    train(optimizer, model, 8, bad=float("nan"), at=6)
    assert_equal_and_finite(model)  # running statistics of BatchNorm included
    if isinstance(base, lt.LocalSGD):
        assert bool(optimizer.state) == (lt.rank() != CULPRIT)
    assert (optimizer.report()["left_out"] > 0) == (lt.rank() == CULPRIT)
    train(optimizer, model, 8, first=8)
    assert_equal_and_finite(model)


@several
def test_gradients_of_the_others_move_all_ranks() -> None:
    model = net()
    optimizer = lt.DistributedOptimizer(sgd(model), model=model, on_nonfinite="skip")
    before = model[0].weight.clone()
    x = torch.full((6, 4), float("nan") if lt.rank() == CULPRIT else 1.0)
    nn.functional.cross_entropy(model[3](model[2](model[0](x))), torch.zeros(6, dtype=torch.long)).backward()
    optimizer.step()
    assert not torch.equal(model[0].weight, before)
    assert_equal_and_finite(model[0])
    assert optimizer.report()["left_out"] == (lt.rank() == CULPRIT)


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_grad_scaler_keeps_its_own_protocol(on_nonfinite: Any) -> None:
    """An overflow is no divergence: every rank skips the step, and the scale falls."""
    model = net()
    optimizer = lt.DistributedOptimizer(sgd(model), model=model, on_nonfinite=on_nonfinite)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        loss = model(x).square().mean()
        if step == 1 and lt.rank() == CULPRIT:
            loss = loss * float("inf")
        before = model[0].weight.clone()
        scaler.scale(loss).backward()
        scaler.step(optimizer, loss=loss)
        scaler.update()
        assert torch.equal(model[0].weight, before) == (step == 1)
    assert optimizer.report()["left_out"] == 0


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_gradients_may_be_unscaled_before_they_are_averaged_and_clipped(on_nonfinite: Any, overlap: bool) -> None:
    """PyTorch's order: only the rank whose gradients overflow sees it, and all ranks do the same all the same."""
    model = net()
    base = lt.AllReduce(overlap=overlap)
    optimizer = lt.DistributedOptimizer(sgd(model), model=model, base=base, on_nonfinite=on_nonfinite)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(4):
        optimizer.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(10 * step + lt.rank()))
        loss = model(x).square().mean()
        if step == 1 and lt.rank() == CULPRIT:
            loss = loss * float("inf")
        before = model[0].weight.clone()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        optimizer.synchronize()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        is_skipped = step == 1 and (on_nonfinite == "raise" or lt.size() == 1)
        assert torch.equal(model[0].weight, before) == is_skipped
        assert all(bool(parameter.isfinite().all()) for parameter in model.parameters())
        own = torch.cat([parameter.detach().reshape(1, -1) for parameter in model.parameters()], dim=1)
        everyone = lt.allgather(own)
        assert (everyone == everyone[0]).all()


@pytest.mark.parametrize("on_nonfinite", ["raise", "skip"])
def test_horovods_way_to_clip_under_a_grad_scaler_continues(on_nonfinite: Any) -> None:
    """synchronize() cannot know yet that a scaler waits for the overflow."""
    model = net()
    optimizer = lt.DistributedOptimizer(sgd(model), model=model, on_nonfinite=on_nonfinite)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step in range(3):
        optimizer.zero_grad()
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        scaler.scale(model(x).square().mean() * (float("inf") if step == 1 else 1.0)).backward()
        optimizer.synchronize()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        with optimizer.skip_synchronize():
            scaler.step(optimizer)
        scaler.update()
    assert scaler.get_scale() == 2.0**7
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())


def test_synchronize_without_a_scaler_is_refused_by_the_step(shared_path: Path) -> None:
    model = net()
    optimizer = lt.DistributedOptimizer(sgd(model), model=model)
    lt.save(shared_path, optimizer)
    model(torch.full((6, 4), float("nan") if lt.rank() == CULPRIT else 1.0)).mean().backward()
    optimizer.synchronize()
    before = model[0].weight.clone()
    with pytest.raises(lt.NonFiniteError) as error:
        optimizer.step()
    assert f"rank {CULPRIT}: the gradient of '0.weight' is not finite" in message_on_every_rank(error)
    assert torch.equal(model[0].weight, before)
    lt.load(shared_path, optimizer)  # the step was not taken: it is not in the middle of one
    optimizer.zero_grad()
    model(torch.full((6, 4), 1.0 + lt.rank())).mean().backward()
    optimizer.step()  # averages gradients again
    assert not torch.equal(model[0].weight, before)
    assert torch.equal(lt.broadcast(model[0].weight.detach(), root_rank=0), model[0].weight)


@several
def test_adacomm_decides_by_the_losses_that_are_finite() -> None:
    model = nn.Linear(2, 1)
    optimizer = lt.AdaComm(sgd(model), model=model, initial_period=4, interval_steps=4, on_nonfinite="skip")
    for step in range(16):
        optimizer.zero_grad()
        model(torch.ones(3, 2)).sum().backward()
        loss = 4.0 if step < 4 else float("nan") if lt.rank() == CULPRIT else 1.0
        optimizer.step(loss=loss)
    periods = [decision["period"] for decision in optimizer.report()["decisions"]]
    assert periods[0] == 2  # a quarter of the loss: half the period
    assert all(other == periods for other in lt.allgather_object(periods))


def test_gossip_without_a_period_cannot_restore_statistics() -> None:
    model = net()
    with pytest.raises(lt.ConfigurationError, match=r"statistics of the model \(BatchNorm's\)"):
        lt.DistributedOptimizer(sgd(model), model=model, base=lt.SGP(), on_nonfinite="skip")
