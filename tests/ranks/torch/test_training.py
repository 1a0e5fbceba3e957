"""Training with PyTorch on several ranks: the oracles that concern a framework (O2, O3, O7, O16, O20 to O25)."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose
from torch import nn

import lentando.torch as lt
from lentando.comm.transport import Transport
from lentando.optimizers.rules.slow_momentum import SlowMomentum

DIMENSION = 13
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)


def vector() -> nn.Linear:
    """A model that is one float64 vector."""
    model = nn.Linear(DIMENSION, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(START)[None])
    return model


def set_gradient(model: nn.Linear, step: int) -> None:
    x = model.weight.detach().numpy()[0]
    model.weight.grad = torch.from_numpy(QUADRATIC(lt.rank(), step, x))[None]


def train_vector(optimizer: lt.DistributedOptimizer, model: nn.Linear, steps: int) -> np.ndarray[Any, Any]:
    for step in range(steps):
        set_gradient(model, step)
        optimizer.step()
    return model.weight.detach().numpy()[0]


class Net(nn.Module):
    """Convolution, BatchNorm (floating-point and integer buffers), tied, frozen and unused parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.Linear(4, 4)
        self.first = nn.Linear(4, 4, bias=False)
        self.tied = nn.Linear(4, 4, bias=False)
        self.tied.weight = self.first.weight
        self.unused = nn.Linear(3, 3)
        self.out = nn.Linear(4, 2)
        for parameter in self.frozen.parameters():
            parameter.requires_grad_(False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.conv(images)).relu().mean(dim=(2, 3))
        result: torch.Tensor = self.out(self.tied(self.first(self.frozen(x)).tanh()))
        return result


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net()


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.05, "momentum": 0.9, **options})


def batches(steps: int, first: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    for step in range(first, first + steps):
        generator = torch.Generator().manual_seed(1000 * lt.rank() + step)
        yield torch.randn(6, 1, 5, 5, generator=generator), torch.randint(0, 2, (6,), generator=generator)


def train(optimizer: torch.optim.Optimizer, model: nn.Module, steps: int, first: int = 0) -> None:
    for images, labels in batches(steps, first):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step(loss=loss) if isinstance(optimizer, lt.DistributedOptimizer) else optimizer.step()


def everyones(tensor: torch.Tensor) -> list[torch.Tensor]:
    return lt.allgather_object(tensor.detach().clone())


def assert_equal_on_all_ranks(model: nn.Module, names: str = "") -> None:
    for name, tensor in model.state_dict().items():
        if names in name:
            for other in everyones(tensor):
                assert torch.equal(other, tensor), name


# --- the same numbers as the reference ----------------------------------------------------------------------


@pytest.mark.parametrize("nesterov", [False, True])
def test_slowmo_in_torch_equals_algorithm_1(nesterov: bool) -> None:
    model = vector()
    optimizer = lt.SlowMo(
        sgd(model, lr=0.1, momentum=0.5),
        period=4,
        slow_lr=0.8,
        slow_momentum=0.6,
        nesterov=nesterov,
        base_buffers="reset",
    )
    x = train_vector(optimizer, model, 22)
    expected = reference.slowmo(
        lt.size(), 22, START, QUADRATIC, 4, lambda _: 0.1, 0.8, 0.6, 0.5, buffers="reset", nesterov=nesterov
    )
    assert_allclose(x, expected.x[lt.rank()], rtol=1e-12, atol=1e-12)


def test_period_1_is_torchs_momentum_sgd_on_the_averaged_gradient() -> None:
    """O2: with torch's own SGD(momentum, dampening=0, nesterov=False) for comparison."""
    slow, synchronous = vector(), vector()
    train_vector(lt.SlowMo(sgd(slow, lr=0.1, momentum=0), period=1, slow_momentum=0.7), slow, 20)
    train_vector(lt.DistributedOptimizer(sgd(synchronous, lr=0.1, momentum=0.7)), synchronous, 20)
    assert_allclose(slow.weight.detach().numpy(), synchronous.weight.detach().numpy(), rtol=1e-12)


@pytest.mark.parametrize("algorithm", ["ring", "engine"])
def test_allreduce_is_sgd_on_the_averaged_gradient(algorithm: Any) -> None:
    """O3's other side."""
    model = vector()
    optimizer = lt.DistributedOptimizer(sgd(model, lr=0.1, momentum=0.7), base=lt.AllReduce(algorithm))
    expected = reference.synchronous_sgd(lt.size(), 20, START, QUADRATIC, 0.1, momentum=0.7)
    assert_allclose(train_vector(optimizer, model, 20), expected, rtol=1e-12)


@pytest.mark.parametrize("nesterov", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_slow_step_is_torchs_sgd_on_the_pseudo_gradient(nesterov: bool, dtype: Any) -> None:
    """O7, and O66 for nesterov: for a constant learning rate, torch.optim.SGD(lr=alpha, momentum=beta)."""
    anchor = START.astype(dtype)
    weights = nn.Parameter(torch.from_numpy(anchor.copy()))
    outer = torch.optim.SGD([weights], lr=0.7, momentum=0.9, nesterov=nesterov)
    rule, slow = SlowMomentum(0.7, 0.9, nesterov), np.zeros(DIMENSION, dtype)
    for t in range(8):
        mean = anchor + np.random.default_rng(t).normal(size=DIMENSION).astype(dtype)
        weights.grad = weights.detach() - torch.from_numpy(mean)
        outer.step()
        rule.step(anchor, slow, mean, learning_rate=0.05)
        assert_allclose(anchor, weights.detach().numpy(), rtol=5e-5 if dtype == np.float32 else 1e-12, atol=1e-6)


def test_gradients_of_several_batches_accumulate_into_one_inner_step() -> None:
    model = vector()
    optimizer = lt.SlowMo(sgd(model, lr=0.1, momentum=0), period=2, slow_momentum=0.5)
    for step in range(6):
        optimizer.zero_grad()
        for _ in range(3):
            (model.weight * torch.from_numpy(QUADRATIC(lt.rank(), step, START)) / 3).sum().backward()
        optimizer.step()
    expected = reference.slowmo(lt.size(), 6, START, lambda i, k, x: QUADRATIC(i, k, START), 2, lambda _: 0.1, beta=0.5)
    assert optimizer.report()["rounds"] == 3
    assert_allclose(model.weight.detach().numpy()[0], expected.x[lt.rank()], rtol=1e-12)


def test_groups_step_outward_by_their_own_learning_rates() -> None:
    def outcome(rates: list[float], factor: float) -> torch.Tensor:
        model = nn.ParameterList([nn.Parameter(torch.zeros(3, dtype=torch.float64)) for _ in rates])
        groups = [{"params": [p], "lr": lr} for p, lr in zip(model, rates, strict=True)]
        optimizer = lt.SlowMo(torch.optim.SGD(groups, lr=9.0), period=2, slow_momentum=0.5)
        for step in range(8):
            for number, parameter in enumerate(model):
                parameter.grad = torch.full_like(parameter, float(step + number + 1))
            if step == 4:
                for group in optimizer.param_groups:
                    group["lr"] *= factor
            optimizer.step()
        return torch.stack(list(model)).detach()

    assert torch.allclose(outcome([0.1, 0.2], 0.5)[0], outcome([0.1, 7.0], 0.5)[0])
    assert torch.allclose(outcome([0.1, 0.2], 0.5)[1], outcome([3.0, 0.2], 0.5)[1])


# --- what an outer step does beside the parameters ----------------------------------------------------------


@pytest.mark.parametrize("base_buffers", ["reset", "maintain", "average"])
def test_base_optimizer_state_is_reset_maintained_or_averaged(base_buffers: Any) -> None:
    """O16."""
    model = net()
    for parameter in model.unused.parameters():
        parameter.requires_grad_(False)
    optimizer = lt.SlowMo(sgd(model), model=model, period=4, base_buffers=base_buffers)
    train(optimizer, model, 3)
    weight = model.out.weight
    images, labels = next(batches(1, first=3))
    optimizer.zero_grad()
    nn.functional.cross_entropy(model(images), labels).backward()
    local = 0.9 * optimizer.state[weight]["momentum_buffer"] + weight.grad
    optimizer.step()
    assert optimizer.report()["rounds"] == 1
    if base_buffers == "reset":
        assert not optimizer.state
    elif base_buffers == "maintain":
        assert torch.equal(optimizer.state[weight]["momentum_buffer"], local)
    else:
        mean = torch.stack(everyones(local)).double().mean(dim=0)
        assert torch.allclose(optimizer.state[weight]["momentum_buffer"].double(), mean, atol=1e-7)
        for other in everyones(optimizer.state[weight]["momentum_buffer"]):
            assert torch.equal(other, optimizer.state[weight]["momentum_buffer"])


def test_stateless_base_optimizer_does_not_care_about_its_buffers() -> None:
    """O16."""
    outcomes = []
    for base_buffers in ("reset", "maintain", "average"):
        model = vector()
        optimizer = lt.SlowMo(sgd(model, momentum=0), period=3, base_buffers=base_buffers)
        outcomes.append(train_vector(optimizer, model, 9).copy())
    assert (outcomes[0] == outcomes[1]).all()
    assert (outcomes[0] == outcomes[2]).all()


OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "adam, fused": lambda p: torch.optim.Adam(p, lr=0.01, fused=True),
    "adamw, amsgrad": lambda p: torch.optim.AdamW(p, lr=0.01, amsgrad=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.01, initial_accumulator_value=0.1),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "nadam": lambda p: torch.optim.NAdam(p, lr=0.01),
    "rprop": lambda p: torch.optim.Rprop(p, lr=0.01),
    "asgd": lambda p: torch.optim.ASGD(p, lr=0.01),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_reset_makes_every_optimizer_new(name: str) -> None:
    """O16: for Adam that includes the step count, so that bias correction starts again."""
    model = net()
    optimizer = lt.SlowMo(OPTIMIZERS[name](model.parameters()), model=model, period=3, base_buffers="reset")
    train(optimizer, model, 3)
    twin = copy.deepcopy(model)
    train(optimizer, model, 2, first=3)
    train(OPTIMIZERS[name](twin.parameters()), twin, 2, first=3)
    for (key, mine), other in zip(model.state_dict().items(), twin.state_dict().values(), strict=True):
        assert torch.equal(mine, other), key


@pytest.mark.parametrize("name", ["adam", "rmsprop"])
def test_averaged_buffers_are_equal_on_all_ranks_and_counters_are_left(name: str) -> None:
    """O16."""
    model = net()
    for parameter in model.unused.parameters():
        parameter.requires_grad_(False)
    optimizer = lt.SlowMo(OPTIMIZERS[name](model.parameters()), model=model, period=3, base_buffers="average")
    train(optimizer, model, 3)
    for state in optimizer.state.values():
        assert state["step"] == 3
        for value in state.values():
            for other in everyones(value):
                assert torch.equal(other, value)


def test_averaging_state_that_some_ranks_lack_is_an_error_that_names_the_parameter() -> None:
    if lt.size() == 1:
        return
    model = vector()
    optimizer = lt.SlowMo(sgd(model), model=model, period=1, base_buffers="average")
    if lt.rank() == 0:
        set_gradient(model, 0)
    with pytest.raises(lt.MismatchError, match=r"rank 0: 'weight\.momentum_buffer'.*: nothing"):
        optimizer.step()


def test_floating_point_buffers_are_averaged_at_outer_steps_and_integer_ones_left() -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model, period=3)
    train(optimizer, model, 2)
    if lt.size() > 1:
        assert not torch.equal(*everyones(model.norm.running_mean)[:2])
    images, labels = next(batches(1, first=2))
    nn.functional.cross_entropy(model(images), labels).backward()
    before = everyones(model.norm.running_var)
    optimizer.step()
    assert torch.allclose(model.norm.running_var, torch.stack(before).mean(dim=0), rtol=1e-6)
    assert_equal_on_all_ranks(model)
    assert model.norm.num_batches_tracked == 3


def test_tied_parameters_stay_tied_and_frozen_ones_stay_put() -> None:
    model = net()
    frozen = model.frozen.weight.clone()
    optimizer = lt.SlowMo(sgd(model), model=model, period=2)
    train(optimizer, model, 4)
    assert model.tied.weight is model.first.weight
    assert torch.equal(model.frozen.weight, frozen)
    assert_equal_on_all_ranks(model)


def test_parameter_without_gradient_on_one_rank_is_averaged_all_the_same() -> None:
    """O22: no hang; equal on all ranks afterwards."""
    for base in (lt.LocalSGD(), lt.AllReduce()):
        model = net()
        optimizer = lt.DistributedOptimizer(sgd(model), model=model, base=base, period=2)
        for step, (images, labels) in enumerate(batches(4)):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(images), labels)
            if lt.rank() == 0 and step % 2:
                loss = loss + model.unused(torch.ones(3)).sum()
            loss.backward()
            optimizer.step()
        assert_equal_on_all_ranks(model)


def test_allreduce_leaves_parameters_that_no_rank_used_without_gradient() -> None:
    model = net()
    optimizer = lt.DistributedOptimizer(sgd(model, weight_decay=0.1), model=model)
    before = model.unused.weight.clone()
    train(optimizer, model, 3)
    assert model.unused.weight.grad is None
    assert torch.equal(model.unused.weight, before)


def test_allreduce_counts_a_missing_gradient_as_zero() -> None:
    model = vector()
    optimizer = lt.DistributedOptimizer(sgd(model, lr=1.0, momentum=0))
    if lt.rank() == 0:
        model.weight.grad = torch.ones_like(model.weight)
    optimizer.step()
    assert_allclose(model.weight.detach().numpy()[0], START - 1 / lt.size())


def test_gradients_zeroed_in_place_are_averaged_without_a_copy() -> None:
    model = vector()
    optimizer = lt.DistributedOptimizer(sgd(model, lr=0.1, momentum=0))
    for step in range(3):
        optimizer.zero_grad(set_to_none=False)
        home = None if model.weight.grad is None else model.weight.grad.data_ptr()
        (model.weight * torch.from_numpy(QUADRATIC(lt.rank(), step, START))).sum().backward()
        optimizer.step()
        assert model.weight.grad is not None
        assert home is None or home == model.weight.grad.data_ptr()
    expected = reference.synchronous_sgd(lt.size(), 3, START, lambda i, k, x: QUADRATIC(i, k, START), 0.1)
    assert_allclose(model.weight.detach().numpy()[0], expected)


# --- starting -----------------------------------------------------------------------------------------------


def test_workers_that_start_differently_are_made_equal() -> None:
    """O25: parameters, frozen ones and buffers of either kind; to rank 0's."""
    model = net(seed=lt.rank())
    with torch.no_grad():
        model.norm.running_mean += lt.rank()
        model.norm.num_batches_tracked += lt.rank()
    reference_model = net(seed=0)
    lt.SlowMo(sgd(model), model=model)
    for (name, mine), other in zip(model.state_dict().items(), reference_model.state_dict().values(), strict=True):
        assert torch.equal(mine, other), name


def test_wrapping_changes_no_value_on_rank_0() -> None:
    model, twin = net(), net()
    images, _ = next(batches(1))
    lt.SlowMo(sgd(model), model=model)
    assert torch.equal(model(images), twin(images))


def test_scheduler_on_either_optimizer_drives_both() -> None:
    """O23: the parameter groups are the same list."""
    for attach_to_wrapper in (True, False):
        model = net()
        base = sgd(model, lr=0.8)
        optimizer = lt.SlowMo(base, model=model, period=2)
        assert optimizer.param_groups is base.param_groups
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer if attach_to_wrapper else base, step_size=1, gamma=0.5)
        for step in range(3):
            train(optimizer, model, 1, first=step)
            scheduler.step()
        assert base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == pytest.approx(0.1)


def test_learning_rate_that_changes_within_a_round_counts_as_its_mean() -> None:
    model = vector()
    optimizer = lt.SlowMo(sgd(model, lr=0.4, momentum=0), period=4, slow_momentum=0.6)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for step in range(12):
        set_gradient(model, step)
        optimizer.step()
        scheduler.step()
    expected = reference.slowmo(lt.size(), 12, START, QUADRATIC, 4, lambda step: 0.4 * 0.9**step, beta=0.6)
    assert_allclose(model.weight.detach().numpy()[0], expected.x[lt.rank()], rtol=1e-10)


def test_learning_rate_0_keeps_the_model_finite() -> None:
    """O19: as in the first step of a warm-up."""
    model = net()
    optimizer = lt.SlowMo(sgd(model, lr=0.0), model=model, period=2)
    train(optimizer, model, 4)
    optimizer.param_groups[0]["lr"] = 0.05
    train(optimizer, model, 4, first=4)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert_equal_on_all_ranks(model)


# --- stopping and resuming ----------------------------------------------------------------------------------


def make(kind: str, model: nn.Module) -> lt.DistributedOptimizer:
    if kind == "slowmo":
        return lt.SlowMo(sgd(model), model=model, period=4, slow_momentum=0.6)
    if kind == "slowmo, adam":
        return lt.SlowMo(torch.optim.Adam(model.parameters(), lr=0.01), model=model, period=3, base_buffers="maintain")
    if kind == "localsgd":
        return lt.DistributedOptimizer(sgd(model), model=model, base=lt.LocalSGD(), period=lt.PostLocal(2, 3))
    return lt.DistributedOptimizer(sgd(model), model=model, base=lt.AllReduce())


@pytest.mark.parametrize("kind", ["slowmo", "slowmo, adam", "localsgd", "allreduce"])
def test_resumed_training_is_the_same_to_the_bit(kind: str, shared_path: Any) -> None:
    """O20, at every step of two rounds, through files and in a model that was built anew."""
    model = net()
    optimizer = make(kind, model)
    for taken in range(9):
        saved = shared_path / f"{kind}-{taken}-{lt.rank()}.pt"
        torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
        train(optimizer, model, 1, first=taken)
    train(optimizer, model, 4, first=9)
    for taken in range(9):
        state = torch.load(shared_path / f"{kind}-{taken}-{lt.rank()}.pt", weights_only=True)
        resumed = net(seed=5 + lt.rank())
        again = make(kind, resumed)
        resumed.load_state_dict(state["model"])
        again.load_state_dict(state["optimizer"])
        train(again, resumed, 13 - taken, first=taken)
        for (name, mine), other in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(mine, other), f"{name}, resumed after step {taken}"
        assert again.report()["rounds"] == optimizer.report()["rounds"]


def test_order_of_constructing_and_loading_does_not_matter() -> None:
    """O21."""
    model = net()
    optimizer = make("slowmo", model)
    train(optimizer, model, 6)
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    train(optimizer, model, 6, first=6)

    loaded_first = net(seed=1)
    loaded_first.load_state_dict(weights)
    one = make("slowmo", loaded_first)  # takes over rank 0's parameters ...
    loaded_first.load_state_dict(weights)  # ... which in the middle of a round are not this rank's
    one.load_state_dict(copy.deepcopy(state))  # torch's optimizers keep the tensors that they are given
    built_first = net(seed=2)
    other = make("slowmo", built_first)
    other.load_state_dict(copy.deepcopy(state))
    built_first.load_state_dict(weights)
    for resumed, again in ((loaded_first, one), (built_first, other)):
        train(again, resumed, 6, first=6)
        for (name, mine), theirs in zip(model.state_dict().items(), resumed.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs), name


def test_state_of_another_rank_is_refused(transport: Transport) -> None:
    if lt.size() == 1:
        return
    model = net()
    optimizer = make("slowmo", model)
    train(optimizer, model, 5)
    states = lt.allgather_object(optimizer.state_dict()["lentando"])
    wrong = {**optimizer.state_dict(), "lentando": states[(lt.rank() + 1) % lt.size()]}
    with pytest.raises(lt.ConfigurationError, match=f"the rank .*is {lt.rank()} here"):
        optimizer.load_state_dict(wrong)


def test_state_of_another_method_or_of_a_plain_optimizer_is_refused() -> None:
    model = net()
    state = make("slowmo", model).state_dict()
    with pytest.raises(lt.ConfigurationError, match="fingerprint of model and settings"):
        make("localsgd", net()).load_state_dict(state)
    with pytest.raises(lt.ConfigurationError, match="no entry 'lentando'"):
        make("slowmo", net()).load_state_dict(sgd(model).state_dict())


# --- what torch users do besides ----------------------------------------------------------------------------


def test_closure_of_lbfgs_sees_the_mean_loss_and_gradient() -> None:
    """Every rank takes the same decisions in the line search, and reaches the minimum of the mean loss."""
    model = vector()
    optimizer = lt.DistributedOptimizer(torch.optim.LBFGS(model.parameters(), line_search_fn="strong_wolfe"))
    centre = torch.full((1, DIMENSION), float(lt.rank()), dtype=torch.float64)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = (model.weight - centre).square().sum()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    assert_allclose(model.weight.detach().numpy(), (lt.size() - 1) / 2, atol=1e-6)
    assert_equal_on_all_ranks(model)


def test_closure_with_local_steps() -> None:
    model, twin = vector(), vector()
    optimizer = lt.SlowMo(sgd(model, momentum=0), period=2)
    other = lt.SlowMo(sgd(twin, momentum=0), period=2)
    for step in range(4):

        def closure(step: int = step) -> float:
            set_gradient(model, step)
            return 1.5

        assert optimizer.step(closure) == 1.5
        set_gradient(twin, step)
        other.step()
    assert torch.equal(model.weight, twin.weight)


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
            assert skipped == (step == 1)  # one rank's overflow is everybody's
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


def test_synchronize_averages_once_so_that_gradients_can_be_clipped() -> None:
    clipped, plain = vector(), vector()
    one = lt.DistributedOptimizer(sgd(clipped, lr=0.1, momentum=0))
    other = lt.DistributedOptimizer(sgd(plain, lr=0.1, momentum=0))
    for step in range(4):
        set_gradient(clipped, step)
        one.synchronize()
        torch.nn.utils.clip_grad_norm_(clipped.parameters(), 1e9)
        with one.skip_synchronize():
            one.step()
    train_vector(other, plain, 4)
    assert torch.equal(clipped.weight, plain.weight)
    assert one.report()["inner_steps"] == 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("kind", ["slowmo", "allreduce"])
def test_models_of_every_floating_point_dtype(dtype: torch.dtype, kind: str) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 1)).to(dtype)
    optimizer = make(kind, model)
    for step in range(8):
        x = torch.randn(4, 5, generator=torch.Generator().manual_seed(lt.rank() + 100 * step)).to(dtype)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    assert_equal_on_all_ranks(model)
    assert all(torch.isfinite(p).all() and p.dtype == dtype for p in model.parameters())


def test_bfloat16_parameters_are_averaged_in_float32() -> None:
    model = nn.Linear(64, 1, bias=False).bfloat16()
    optimizer = lt.DistributedOptimizer(sgd(model), base=lt.LocalSGD(), period=1)
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(0)))
    optimizer._replica.before_step()
    with torch.no_grad():
        model.weight.copy_(torch.randn(1, 64, generator=torch.Generator().manual_seed(1 + lt.rank())))
    mean = torch.stack(everyones(model.weight)).double().mean(dim=0)
    optimizer.step()
    assert torch.equal(model.weight, mean.to(torch.bfloat16))


def test_model_of_two_dtypes_has_two_flat_buffers() -> None:
    model = nn.Sequential(nn.Linear(5, 8).double(), nn.Linear(3, 2))
    optimizer = lt.SlowMo(sgd(model), model=model, period=1)
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, float(lt.rank()))
    optimizer.step()
    assert_equal_on_all_ranks(model)


def test_memory_order_survives() -> None:
    torch.manual_seed(0)
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    optimizer = lt.DistributedOptimizer(sgd(model), model=model)
    assert model.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(model.weight, twin.weight)
    images = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(lt.rank()))
    model(images).square().mean().backward()
    mean = torch.stack(everyones(model.weight.grad)).mean(dim=0)
    optimizer.step()
    assert torch.allclose(model.weight, twin.weight - 0.05 * mean, atol=1e-6)


@pytest.mark.parametrize("kind", ["slowmo", "allreduce"])
def test_staged_memory_gives_the_same_results(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The path that a GPU takes, host memory apart from the parameters, on a CPU. No GPU has been used here."""
    direct = net()
    optimizer = make(kind, direct)
    train(optimizer, direct, 9)

    from lentando.torch import optimizer as module

    monkeypatch.setattr(module, "TorchModel", lambda *arguments: TorchModel(*arguments, staged=True))
    from lentando.torch.model import TorchModel

    staged = net()
    optimizer = make(kind, staged)
    assert optimizer._model._memory[0].flat.data_ptr() != optimizer._model._memory[0]._host.data_ptr()
    train(optimizer, staged, 9)
    for mine, other in zip(direct.state_dict().values(), staged.state_dict().values(), strict=True):
        assert torch.equal(mine, other)


def test_averaged_evaluates_the_mean_model_and_restores_the_own() -> None:
    model = net()
    optimizer = make("slowmo", model)
    train(optimizer, model, 6)
    own = copy.deepcopy(model.state_dict())
    weights = everyones(model.out.weight)
    with optimizer.averaged():
        assert torch.allclose(model.out.weight, torch.stack(weights).mean(dim=0), atol=1e-6)
        assert_equal_on_all_ranks(model)
    for name, value in model.state_dict().items():
        assert torch.equal(value, own[name]), name
    train(optimizer, model, 4, first=6)


# --- messages -----------------------------------------------------------------------------------------------


def test_47_of_48_steps_send_nothing(transport: Transport) -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model, period=48)
    silent = 0
    for step in range(96):
        before = transport.traffic.copy()
        train(optimizer, model, 1, first=step)
        silent += transport.traffic == before
    assert silent == 2 * 47
    assert optimizer.report()["rounds"] == 2


# --- wrong use ----------------------------------------------------------------------------------------------


def differing(rank: int) -> dict[str, tuple[nn.Module, str]]:
    """Models that are another one on the last rank, and what the error must name."""
    last = rank == lt.size() - 1
    return {
        "shape": (nn.Sequential(nn.Linear(4, 5 if last else 6)), r"'0\.weight' of shape \[6, 4\]"),
        "dtype": (nn.Sequential(nn.Linear(4, 5)).to(torch.float64 if last else torch.float32), "float64"),
        "name": (nn.Sequential(*([nn.Tanh()] * last), nn.Linear(4, 5)), r"'1\.weight'"),
        "number": (nn.Sequential(nn.Linear(4, 5), *([nn.Linear(5, 1)] * last)), "of 2 or 4 in all"),
        "memory order": (
            nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last if last else torch.contiguous_format),
            "memory order channels_last",
        ),
    }


@pytest.mark.parametrize("kind", ["shape", "dtype", "name", "number", "memory order"])
def test_different_models_are_refused_on_every_rank(kind: str) -> None:
    if lt.size() == 1:
        return
    model, text = differing(lt.rank())[kind]
    with pytest.raises(lt.MismatchError, match=text) as error:
        lt.SlowMo(sgd(model), model=model)
    assert f"rank {lt.size() - 1}" in str(error.value)


@pytest.mark.parametrize(
    "replace",
    [lambda model: model.double(), lambda model: setattr(model.weight, "data", model.weight.data.clone())],
    ids=["converted", "rebound"],
)
def test_replaced_parameters_are_noticed_at_the_first_step_and_at_each_round(replace: Callable[[Any], Any]) -> None:
    first = nn.Linear(4, 1)
    optimizer = lt.SlowMo(sgd(first), model=first, period=3)
    replace(first)
    with pytest.raises(lt.ConfigurationError, match="'weight' no longer uses the memory"):
        optimizer.step()
    later = nn.Linear(4, 1)
    optimizer = lt.SlowMo(sgd(later), model=later, period=3)
    optimizer.step()
    replace(later)
    optimizer.step()
    with pytest.raises(lt.ConfigurationError, match=r"model.to\(\)"):
        optimizer.step()


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"slow_momentum": 1.0}, "slow_momentum must be a number >= 0 and < 1, got 1.0"),
        ({"slow_momentum": -0.1}, "slow_momentum"),
        ({"slow_momentum": float("nan")}, "slow_momentum"),
        ({"slow_lr": 0.0}, "slow_lr must be a number > 0, got 0.0"),
        ({"slow_lr": float("inf")}, "slow_lr"),
        ({"period": 0}, "period must be an integer >= 1"),
        ({"period": 2.5}, r"period must be an integer >= 1 \(inner steps\), got 2.5"),
        ({"period": True}, "period"),
        ({"period": None}, "an outer step needs period="),
        ({"slow_momentum": 0.0, "nesterov": True}, "nesterov=True needs slow_momentum > 0"),
        ({"base_buffers": "zero"}, "base_buffers must be one of 'reset', 'maintain', 'average', 'auto', got 'zero'"),
        ({"algorithm": "tree"}, "algorithm must be one of 'auto', 'measured', 'ring', 'engine', got 'tree'"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], text: str) -> None:
    """O26."""
    with pytest.raises(lt.ConfigurationError, match=text):
        lt.SlowMo(sgd(net()), **options)


def test_local_sgd_without_period_is_refused() -> None:
    with pytest.raises(lt.ConfigurationError, match="the replicas would never hear of each other"):
        lt.DistributedOptimizer(sgd(net()), base=lt.LocalSGD())


def test_other_misuse_is_refused() -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model)
    with pytest.raises(lt.ConfigurationError, match="is a DistributedOptimizer already"):
        lt.SlowMo(optimizer)
    with pytest.raises(lt.ConfigurationError, match="expected a torch.optim.Optimizer to wrap, got Net"):
        lt.SlowMo(model)  # type: ignore[arg-type]
    frozen = nn.Linear(2, 2).requires_grad_(False)
    with pytest.raises(lt.ConfigurationError, match="no trainable parameter"):
        lt.SlowMo(sgd(frozen))


def test_sparse_gradients_are_refused_by_allreduce() -> None:
    model = nn.Embedding(5, 3, sparse=True)
    optimizer = lt.DistributedOptimizer(sgd(model, momentum=0), model=model)
    model(torch.tensor([1])).sum().backward()
    with pytest.raises(lt.ConfigurationError, match="'weight' has a sparse gradient"):
        optimizer.step()


def test_non_finite_parameters_are_refused_by_name_and_rank() -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model, period=2)
    train(optimizer, model, 1)
    if lt.rank() == lt.size() - 1:
        with torch.no_grad():
            model.out.bias[1] = float("nan")
    with pytest.raises(lt.NonFiniteError, match=rf"rank {lt.size() - 1}: 'out\.bias' is not finite"):
        optimizer.step()
