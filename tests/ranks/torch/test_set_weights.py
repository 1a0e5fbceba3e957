"""Weights that the program sets between steps, in PyTorch: noticed, whatever wrote them, and nothing else is."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt
from lentando.torch.model import TorchModel

PERIOD = 4


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).double()


def step(model: nn.Module, optimizer: Any, number: int, rank: int | None = None) -> None:
    rank = lt.rank() if rank is None else rank
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(100 * number + rank), dtype=torch.float64)
    optimizer.zero_grad()
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    optimizer.step()


def run(model: nn.Module, optimizer: Any, first: int, last: int) -> None:
    for number in range(first, last):
        step(model, optimizer, number)


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING]


def state(model: nn.Module) -> dict[str, Any]:
    return copy.deepcopy(model.state_dict())


def assert_same(model: nn.Module, other: dict[str, Any], **tolerance: float) -> None:
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, other[name], **({"rtol": 0, "atol": 0} | tolerance))


def averages(of: nn.Module) -> dict[str, Any]:
    return {
        name: torch.from_numpy(lt.allreduce(t, op=lt.Average).numpy()) if t.is_floating_point() else t
        for name, t in state(of).items()
    }


# How a program may set weights. Each is given the model and the weights.


def by_loading(model: nn.Module, weights: dict[str, Any]) -> None:
    model.load_state_dict(weights)


def by_copying(model: nn.Module, weights: dict[str, Any]) -> None:
    for name, parameter in model.named_parameters():
        parameter.data.copy_(weights[name])  # PyTorch's own count of changes does not see this one


def by_numpy(model: nn.Module, weights: dict[str, Any]) -> None:
    for name, parameter in model.named_parameters():
        parameter.detach().numpy()[...] = weights[name].numpy()


def one_layer(model: nn.Module, weights: dict[str, Any]) -> None:
    with torch.no_grad():
        model[3].bias.fill_(3.0)


@pytest.mark.parametrize("set_weights", [by_loading, by_copying, by_numpy, one_layer])
@pytest.mark.parametrize("taken", [PERIOD, PERIOD + 1])  # between two rounds, and inside one
def test_next_outer_step_adopts_the_average_and_begins_with_no_momentum(
    set_weights: Callable[..., None], taken: int, caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    start = state(model)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.05), model=model, period=PERIOD, slow_momentum=0.9)
    run(model, optimizer, 0, taken)
    set_weights(model, start)
    run(model, optimizer, taken, 2 * PERIOD - 1)
    # The last step of the round, without the outer step, for comparison.
    twin = net()
    twin.load_state_dict(model.state_dict())
    step(twin, torch.optim.SGD(twin.parameters(), lr=0.05), 2 * PERIOD - 1)
    expected = averages(twin)
    caplog.clear()
    run(model, optimizer, 2 * PERIOD - 1, 2 * PERIOD)
    assert_same(model, expected, rtol=1e-12, atol=1e-12)
    found = warnings(caplog)
    assert len(found) == (lt.rank() == 0)
    assert all("the program has set weights on all ranks since the last outer step: outer step 2" in f for f in found)
    # From here on it trains as one that begins with these weights.
    other = net()
    other.load_state_dict(model.state_dict())
    fresh = lt.SlowMo(torch.optim.SGD(other.parameters(), lr=0.05), model=other, period=PERIOD, slow_momentum=0.9)
    for number in range(2 * PERIOD, 4 * PERIOD):
        step(model, optimizer, number)
        step(other, fresh, number)
    assert_same(model, other.state_dict())
    assert len(warnings(caplog)) == (lt.rank() == 0), "it is reported once"


def test_weights_that_one_rank_sets_are_averaged_with_the_others(caplog: pytest.LogCaptureFixture) -> None:
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    optimizer = lt.DiLoCo(torch.optim.SGD(model.parameters(), lr=0.0), model=model, period=2)
    for number in range(4):
        optimizer.zero_grad()
        model(torch.ones(1, 1)).sum().backward()
        if number == 2 and lt.rank() == lt.size() - 1:
            with torch.no_grad():
                model.weight.fill_(float(lt.size()))
        optimizer.step()
    assert model.weight.item() == pytest.approx(1.0)
    if lt.rank() == 0:
        (found,) = warnings(caplog)
        assert (f"on rank {lt.size() - 1} of {lt.size()}" if lt.size() > 1 else "on all ranks") in found


BASES = [lt.LocalSGD(), lt.SGP(), lt.OSGP(staleness=2, deterministic=True), lt.DPSGD(lt.Ring()), lt.AllReduce()]


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_rollback_is_not_undone_by_any_base_algorithm(base: Any) -> None:
    """With a learning rate of almost zero, weights stay where they were put: no old ones come back from anywhere."""
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = lt.SlowMo(sgd, model=model, base=base, period=PERIOD, slow_momentum=0.9)
    run(model, optimizer, 0, PERIOD + 2)
    sgd.param_groups[0]["lr"] = 1e-9
    best = {name: t + 1 if t.is_floating_point() else t for name, t in state(net(1)).items()}
    model.load_state_dict(best)
    for number in range(PERIOD + 2, 5 * PERIOD):
        step(model, optimizer, number)
        for name, parameter in model.named_parameters():
            torch.testing.assert_close(parameter.detach(), best[name], rtol=1e-6, atol=1e-6)


def test_gossip_without_outer_steps_continues_from_the_new_weights() -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.1)
    optimizer = lt.DistributedOptimizer(sgd, model=model, base=lt.OSGP(lt.Ring(), staleness=2, deterministic=True))
    run(model, optimizer, 0, 5)
    sgd.param_groups[0]["lr"] = 0.0
    best = state(net(1))
    model.load_state_dict(best)
    run(model, optimizer, 5, 10)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), best[name])


def test_synchronous_training_refuses_weights_that_differ(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = lt.DistributedOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), model=model)
    run(model, optimizer, 0, 2)
    model.load_state_dict(net(1).state_dict())  # the same on all ranks
    run(model, optimizer, 2, 4)
    if lt.size() > 1:
        if lt.rank() == 1:
            model.load_state_dict(net(2).state_dict())
        with pytest.raises(lt.MismatchError, match=f"set weights on rank 1 of {lt.size()}, and the ranks now have"):
            step(model, optimizer, 4)
        lt.broadcast_parameters(model.state_dict(), root_rank=0)
        run(model, optimizer, 4, 6)
    assert warnings(caplog) == []


# --- what must not be taken for it ------------------------------------------------------------------------------


def clip_weights(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.data.clamp_(-0.3, 0.3)


def mask_weights(model: nn.Module) -> None:
    with torch.no_grad():
        model[0].weight[::2] = 0


def limit_norms(model: nn.Module) -> None:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5 / max(0.5, float(parameter.norm())))


@pytest.mark.parametrize("project", [clip_weights, mask_weights, limit_norms])
def test_corrections_after_each_step_are_part_of_training(
    project: Callable[..., None], caplog: pytest.LogCaptureFixture
) -> None:
    model = net()
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=PERIOD)
    project(model)
    for number in range(6 * PERIOD):
        step(model, optimizer, number)
        project(model)
    assert warnings(caplog) == []


def test_weights_put_aside_for_an_evaluation_are_no_change(caplog: pytest.LogCaptureFixture) -> None:
    """As exponential moving averages do: swapped in, evaluated, swapped out."""
    model = net()
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=PERIOD)
    for number in range(3 * PERIOD):
        step(model, optimizer, number)
        own = state(model)
        model.load_state_dict(net(5).state_dict())
        model.load_state_dict(own)
        with optimizer.averaged():
            pass
        optimizer.consensus_distance()
    assert warnings(caplog) == []


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_nothing_of_our_own_is_taken_for_it(base: Any, caplog: pytest.LogCaptureFixture, shared_path: Any) -> None:
    """Construction, weights loaded before the first step, evaluation, join, checkpoints of either kind."""
    model = net(lt.rank())
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, base=base, period=PERIOD)
    model.load_state_dict(net(3).state_dict())
    lt.broadcast_parameters(model.state_dict(), root_rank=0)
    found = optimizer.training().replica.framework.watch
    for number in range(PERIOD + 2):
        step(model, optimizer, number)
        with optimizer.averaged():
            model.eval()
        model.train()
        optimizer.report()
        assert not found.found
    lt.save(shared_path / "one", optimizer)
    torch.save([model.state_dict(), optimizer.state_dict()], shared_path / f"{lt.rank()}.pt")
    with lt.join(optimizer):
        for number in range(2 + lt.rank()):
            step(model, optimizer, number)
    assert not found.found
    lt.load(shared_path / "one", optimizer)
    run(model, optimizer, 0, 2)
    assert not found.found
    for order in (0, 1):  # of the model's state and the optimizer's
        saved_model, saved_optimizer = torch.load(shared_path / f"{lt.rank()}.pt")
        loads = [lambda: model.load_state_dict(saved_model), lambda: optimizer.load_state_dict(saved_optimizer)]  # noqa: B023
        for load in (loads, loads[::-1])[order]:
            load()
        run(model, optimizer, PERIOD + 2, 2 * PERIOD + 1)
        assert not found.found
    assert warnings(caplog) == []


# --- where it must not be lost -----------------------------------------------------------------------------------


@pytest.mark.parametrize("between", ["averaged", "consensus", "saved", "state", "joined"])
def test_a_change_is_not_lost_in_what_happens_before_the_next_step(between: str, shared_path: Any) -> None:
    model = net()
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.05), model=model, period=PERIOD, slow_momentum=0.9)
    run(model, optimizer, 0, PERIOD + 1)

    def change() -> None:
        model.load_state_dict(net(7).state_dict())

    if between == "averaged":
        change()
        with optimizer.averaged():
            pass
    elif between == "consensus":
        change()
        optimizer.consensus_distance()
    elif between == "joined":
        with lt.join(optimizer):
            step(model, optimizer, PERIOD + 1)
            change()
    else:
        change()
        if between == "saved":
            lt.save(shared_path / "one", optimizer)
        else:
            torch.save([model.state_dict(), optimizer.state_dict()], shared_path / f"{lt.rank()}.pt")
        model = net(9)
        sgd = torch.optim.SGD(model.parameters(), lr=0.05)
        optimizer = lt.SlowMo(sgd, model=model, period=PERIOD, slow_momentum=0.9)
        if between == "saved":
            lt.load(shared_path / "one", optimizer)
        else:
            for owner, saved in zip((model, optimizer), torch.load(shared_path / f"{lt.rank()}.pt"), strict=True):
                owner.load_state_dict(saved)
    if between != "joined":  # whose end is an outer step, which has adopted it
        assert optimizer.training().replica.state_dict()["weights_set"]
        run(model, optimizer, PERIOD + 1, 2 * PERIOD)
    slow = optimizer.training().replica.state_dict()["outer"]["slow_buffers"]["flat"]
    assert all(not buffer.any() for buffer in slow)


def test_without_exact_average_each_replica_decides_for_itself(caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    sgd = torch.optim.SGD(model.parameters(), lr=0.05)
    optimizer = lt.SlowMo(sgd, model=model, base=lt.SGP(), period=PERIOD, exact_average=False, slow_momentum=0.9)
    run(model, optimizer, 0, PERIOD + 1)
    if lt.rank() == 0:
        model.load_state_dict(net(7).state_dict())
    run(model, optimizer, PERIOD + 1, 2 * PERIOD)
    slow = optimizer.training().replica.state_dict()["outer"]["slow_buffers"]["flat"]
    assert all(buffer.any() != (lt.rank() == 0) for buffer in slow)
    assert len(warnings(caplog)) == (lt.rank() == 0)


def test_weights_apart_from_the_flat_memory_are_watched_on_their_device(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[TorchModel] = []
    plain = TorchModel.__init__

    def staged(self: TorchModel, *arguments: Any, **options: Any) -> None:
        made.append(self)
        plain(self, *arguments, **options, staged=True)

    monkeypatch.setattr(TorchModel, "__init__", staged)
    model = net()
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.05), model=model, period=PERIOD, slow_momentum=0.9)
    run(model, optimizer, 0, PERIOD + 1)
    clip_weights(model)
    assert not made[0].watch.found
    best = state(net(7))
    by_copying(model, best)
    run(model, optimizer, PERIOD + 1, 2 * PERIOD - 1)
    assert made[0].watch.found
    run(model, optimizer, 2 * PERIOD - 1, 2 * PERIOD)
    assert not made[0].watch.found


# --- restart() -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("base", BASES, ids=repr)
def test_restart_begins_as_a_new_optimizer_does(base: Any, caplog: pytest.LogCaptureFixture) -> None:
    model = net()
    optimizer = lt.SlowMo(
        torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9), model=model, base=base, period=PERIOD
    )
    run(model, optimizer, 0, PERIOD + 1)
    best = state(net(7))
    model.load_state_dict(best)
    optimizer.restart(base_state="reset")
    assert_same(model, best)
    other = net(7)
    sgd = torch.optim.SGD(other.parameters(), lr=0.05, momentum=0.9)
    fresh = lt.SlowMo(sgd, model=other, base=base, period=PERIOD)
    if isinstance(base, lt.LocalSGD | lt.AllReduce):  # the graph of gossip continues with its phase
        for number in range(3 * PERIOD):
            step(model, optimizer, number)
            step(other, fresh, number)
        assert_same(model, other.state_dict())
    assert optimizer.report()["inner_steps"] >= PERIOD + 1
    assert warnings(caplog) == []


def test_restart_averages_weights_that_differ() -> None:
    model = net()
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), model=model, period=PERIOD)
    run(model, optimizer, 0, PERIOD + 2)
    expected = averages(model)
    momenta = [s["momentum_buffer"].clone() for s in optimizer.state.values()]
    optimizer.restart()
    assert_same(model, expected, rtol=1e-12, atol=1e-12)
    assert optimizer.consensus_distance() == 0
    for own, before in zip(optimizer.state.values(), momenta, strict=True):
        torch.testing.assert_close(own["momentum_buffer"], before, rtol=0, atol=0)
    rounds = optimizer.report()["rounds"]
    run(model, optimizer, 0, PERIOD - 1)
    assert optimizer.report()["rounds"] == rounds
    run(model, optimizer, 0, 1)
    assert optimizer.report()["rounds"] == rounds + 1


def test_restart_where_it_is_not_possible() -> None:
    model = net()
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=PERIOD)
    optimizer.restart()  # before the first step there is nothing to forget
    run(model, optimizer, 0, 1)
    with optimizer.averaged(), pytest.raises(lt.ConfigurationError, match="restart\\(\\) is not possible inside aver"):
        optimizer.restart()
    with lt.join(optimizer), pytest.raises(lt.ConfigurationError, match="not possible inside join"):
        optimizer.restart()
    with pytest.raises(lt.ConfigurationError, match="base_state must be 'keep' or 'reset', got 'new'"):
        optimizer.restart(base_state="new")  # type: ignore[arg-type]
    if lt.rank() == lt.size() - 1:
        with torch.no_grad():
            model[0].weight[0, 0] = float("nan")
    with pytest.raises(lt.NonFiniteError, match=f"rank.*{lt.size() - 1}.*'0.weight' is not finite"):
        optimizer.restart()
