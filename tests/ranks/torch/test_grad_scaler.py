"""Training under `torch.amp.GradScaler`."""

import pytest
import torch
from torch import nn
from torch_training import assert_equal_on_all_ranks, batches, make, net, sgd, train

import lentando.torch as lt


@pytest.mark.parametrize("kind", ["slowmo", "allreduce"])
@pytest.mark.parametrize("unscale_first", [False, True])
@pytest.mark.parametrize("fused", [False, True])
def test_overflow_under_grad_scaler_on_one_rank_keeps_the_ranks_in_step(
    kind: str, unscale_first: bool, fused: bool
) -> None:
    model = net()
    base = sgd(model, fused=fused)
    if kind == "slowmo":
        optimizer = lt.SlowMo(base, model=model, period=3)
    else:
        optimizer = lt.DistributedOptimizer(base, model=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for step, (images, labels) in enumerate(batches(6)):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        if step == 1 and lt.rank() == lt.size() - 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if unscale_first:
            scaler.unscale_(optimizer)
        before = model.out.weight.clone()
        scaler.step(optimizer)
        scaler.update()
        skipped = torch.equal(before, model.out.weight)
        if kind == "allreduce":
            assert skipped == (step == 1)  # one rank's overflow is all ranks'
        elif step == 1:
            assert skipped == (lt.rank() == lt.size() - 1)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert optimizer.report()["inner_steps"] == 6
    assert_equal_on_all_ranks(model, "weight")


def test_grad_scaler_changes_nothing_without_overflow() -> None:
    plain, scaled = net(), net()
    one, other = make("slowmo", plain), make("slowmo", scaled)
    train(one, plain, 6)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for images, labels in batches(6):
        other.zero_grad()
        scaler.scale(nn.functional.cross_entropy(scaled(images), labels)).backward()
        scaler.step(other)
        scaler.update()
    for mine, theirs in zip(plain.parameters(), scaled.parameters(), strict=True):
        assert torch.allclose(mine, theirs, atol=1e-6)
