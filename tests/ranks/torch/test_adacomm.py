"""AdaComm with PyTorch on several ranks: every rank sees another loss, and all decide alike."""

from typing import Any

import numpy as np
import pytest
import reference
import torch
from case_selection import selected_cases
from torch import nn

import lentando.torch as lt
from lentando.comm.transport import Transport

LOSSES = [2.3, 1.15, 0.575, 0.56, 0.55, 0.2, 0.05]
REFINED = [20, 15, 10, 5, 2, 1, 1]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))


def adacomm(model: nn.Module, lr: float = 0.05, **options: Any) -> lt.DistributedOptimizer:
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return lt.AdaComm(sgd, model=model, **{"initial_period": 20, "interval_steps": 1, **options})


def train(optimizer: lt.DistributedOptimizer, model: nn.Module, steps: int, first: int = 0) -> None:
    """Real losses, of other data on every rank."""
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * lt.rank() + step)
        x = torch.randn(6, 4, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - (1 + lt.rank()) * x.sum(1, keepdim=True)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)


def everyones(value: Any) -> list[Any]:
    return lt.allgather_object(value)


def assert_all_decided_alike(optimizer: lt.DistributedOptimizer, model: nn.Module) -> list[int]:
    decisions = optimizer.report()["decisions"]
    for other in everyones(decisions):
        assert other == decisions
    return [decision["period"] for decision in decisions]


@pytest.mark.parametrize("given", ["float", "tensor", "closure"])
def test_papers_periods_from_losses_that_only_agree_in_the_mean(given: str) -> None:
    """O31, O35. However the loss is passed."""
    model = net()
    optimizer = adacomm(model)
    own = 50.0 * (lt.rank() - (lt.size() - 1) / 2)
    for _ in range(sum(REFINED) + 19):
        loss = torch.tensor(LOSSES[min(optimizer.rounds, 6)] + own, dtype=torch.float64)

        def closure(loss: torch.Tensor = loss) -> torch.Tensor:
            optimizer.zero_grad()
            model(torch.ones(1, 4)).square().mean().backward()
            return loss

        if given == "closure":
            optimizer.step(closure)
        else:
            closure()
            optimizer.step(loss=loss if given == "tensor" else loss.item())
    assert [20, *assert_all_decided_alike(optimizer, model)] == REFINED


@pytest.mark.parametrize(
    "options",
    [{}, {"slow_momentum": 0.3}, {"base": lt.SGP()}, {"base": lt.OSGP(), "slow_momentum": 0.3}, {"warmup_steps": 5}],
    ids=str,
)
def test_periods_fall_in_training_and_are_the_same_on_all_ranks(options: dict[str, Any], transport: Transport) -> None:
    model = net()
    optimizer = adacomm(model, initial_period=8, interval_steps=12, **options)
    train(optimizer, model, 72)
    periods = assert_all_decided_alike(optimizer, model)
    assert periods[-1] == 1
    assert periods == sorted(periods, reverse=True)
    weights = transport.allgather(np.concatenate([p.detach().numpy().ravel() for p in model.parameters()]))
    assert (weights == weights[0]).all()  # the last round, of one step, has just ended


def test_intervals_go_by_the_clock_of_rank_0() -> None:
    """Real time. Ranks whose clocks disagreed about the end of an interval would end in a MismatchError."""
    model = net()
    optimizer = adacomm(model, initial_period=8, interval_steps=None, interval_seconds=0.01)
    train(optimizer, model, 60)
    while everyones(len(optimizer.report()["decisions"]))[0] < 4:
        train(optimizer, model, 20)
    assert_all_decided_alike(optimizer, model)


@pytest.mark.parametrize("slow_momentum", [0.3, *selected_cases([], [0.0])])
def test_resumed_training_is_the_same_bit_identically(slow_momentum: float, shared_path: Any) -> None:
    """In the middle of an interval and of a round, through files."""
    options = {"initial_period": 6, "interval_steps": 10, "min_period": 2, "slow_momentum": slow_momentum}
    model = net()
    optimizer = adacomm(model, **options)
    for taken in range(0, 40, 4):
        saved = shared_path / f"{taken}-{lt.rank()}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        train(optimizer, model, 4, first=taken)
    periods = assert_all_decided_alike(optimizer, model)
    assert len(periods) >= 3
    for taken in (16, 20, 32):
        state = torch.load(shared_path / f"{taken}-{lt.rank()}.pt", weights_only=True)
        resumed = net()
        again = adacomm(resumed, **options)
        resumed.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        train(again, resumed, 40 - taken, first=taken)
        assert assert_all_decided_alike(again, resumed) == periods
        for mine, other in zip(model.parameters(), resumed.parameters(), strict=True):
            assert torch.equal(mine, other)


def test_period_of_1_is_synchronous_momentum_sgd() -> None:
    """O37: at the end of its way AdaComm has become synchronous SGD, the base optimizer's momentum included."""
    model, twin = net(), net()
    train(adacomm(model, initial_period=1), model, 12)
    synchronous = lt.DistributedOptimizer(torch.optim.SGD(twin.parameters(), lr=0.05, momentum=0.9), model=twin)
    train(synchronous, twin, 12)
    for mine, other in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(mine, other, rtol=1e-4, atol=1e-6)


def test_learning_rate_decay_lengthens_the_period() -> None:
    model = net()
    optimizer = adacomm(model, initial_period=4, interval_steps=8, refined=False)
    scheduler = torch.optim.lr_scheduler.MultiStepLR(optimizer, [40], gamma=0.01)
    for step in range(80):
        train(optimizer, model, 1, first=step)
        scheduler.step()
    assert_all_decided_alike(optimizer, model)
    periods = {decision["step"]: decision["period"] for decision in optimizer.report()["decisions"]}
    before = [period for step, period in periods.items() if step <= 40]
    after = [period for step, period in periods.items() if step >= 48]
    assert min(after) > max(before)


def test_scheduler_may_wait_for_the_period_to_be_1() -> None:
    """As the paper does. The ranks' learning rates stay equal, because the period is."""
    model = net()
    optimizer = adacomm(model, initial_period=8, interval_steps=8)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    rates = []
    for step in range(60):
        train(optimizer, model, 1, first=step)
        if optimizer.period == 1:
            scheduler.step()
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates[7] == 0.05
    assert rates[-1] < 0.05
    assert all(other == rates for other in everyones(rates))


def test_step_without_its_loss_is_refused_at_once() -> None:
    model = net()
    optimizer = adacomm(model)
    model(torch.ones(1, 4)).sum().backward()
    with pytest.raises(lt.ConfigurationError, match=f"inner step 1 on rank {lt.rank()} came without its"):
        optimizer.step()
    with pytest.raises(lt.ConfigurationError, match="training loss"):
        adacomm(model).step(lambda: None)


VALIDATION = np.array([[4.0, 2.0, 3.0], [3.0, 1.0, np.nan], [np.nan] * 3, [2.0, 0.5, 1.0], [2.0, 0.5, 1.0], [0.1] * 3])
"""Of three ranks, by round. In the third round none has evaluated; in the second, the last one has not."""


def test_periods_follow_the_mean_validation_loss_of_all_ranks() -> None:
    model = net()
    optimizer = adacomm(model, initial_period=16, by_validation_loss=True)
    losses = np.stack([VALIDATION[:, rank % 3] for rank in range(lt.size())], axis=1)
    for own in losses[:, lt.rank()]:
        first = optimizer.rounds
        while optimizer.rounds == first:
            if optimizer.period is not None and not np.isnan(own):
                optimizer.schedule.record_validation_loss(float(own))
            model(torch.ones(1, 4)).square().mean().backward()
            optimizer.step()  # needs no training loss
    expected = reference.adacomm_by_validation(losses, 16)
    assert [16, *assert_all_decided_alike(optimizer, model)] == expected
    assert len(expected) == 5
    assert optimizer.period == expected[-1]


def test_a_recorded_validation_loss_is_saved_until_it_counts() -> None:
    periods = []
    for is_resumed in (False, True):
        model = net()
        optimizer = adacomm(model, initial_period=4, by_validation_loss=True)
        for step in range(16):
            if step % 4 == 1:
                optimizer.schedule.record_validation_loss(2.0 ** -(step // 4) + lt.rank())
                if is_resumed:
                    state = optimizer.state_dict()
                    optimizer = adacomm(model, initial_period=4, by_validation_loss=True)
                    optimizer.load_state_dict(state)
            model(torch.ones(1, 4)).square().mean().backward()
            optimizer.step()
        periods.append(assert_all_decided_alike(optimizer, model))
    assert periods[0] == periods[1] != []


def test_validation_loss_of_a_schedule_that_follows_the_training_loss_is_refused() -> None:
    with pytest.raises(lt.ConfigurationError, match="give by_validation_loss=True"):
        adacomm(net()).schedule.record_validation_loss(1.0)
    with pytest.raises(lt.ConfigurationError, match="must be one number"):
        adacomm(net(), by_validation_loss=True).schedule.record_validation_loss(torch.ones(2))
    assert adacomm(net(), warmup_steps=2).schedule.following.steps() == 20
    assert lt.SlowMo(torch.optim.SGD(net().parameters(), 0.1), period=5).schedule == lt.FixedPeriod(5)
    assert lt.DistributedOptimizer(torch.optim.SGD(net().parameters(), 0.1)).schedule is None


def test_impossible_options_are_refused() -> None:
    for options, text in (
        ({"initial_period": 0}, "initial_period must be an integer >= 1"),
        ({"interval_seconds": -1.0, "interval_steps": None}, "interval_seconds must be > 0"),
        ({"slow_momentum": 1.0}, "slow_momentum must be a number"),
        ({"warmup_steps": -1}, "start of PostLocal must be an integer >= 0"),
    ):
        with pytest.raises(lt.ConfigurationError, match=text):
            adacomm(net(), **options)
    with pytest.raises(TypeError, match="period"):
        adacomm(net(), period=4)
