"""Optimizers that hold another one, or keep state in another dtype, are saved, loaded, reset and averaged."""

import copy
from collections import OrderedDict, defaultdict
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt


class Delegating(torch.optim.Optimizer):
    """All of its state is the inner optimizer's, and ``state_dict()`` says so; its list of groups is not renewed."""

    def __init__(self, parameters: Any) -> None:
        self.inner = torch.optim.SGD(parameters, lr=0.05, momentum=0.9)
        super().__init__([{"params": [torch.zeros(1)]}], {})
        self.param_groups = self.inner.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inner.step(closure)

    def state_dict(self) -> Any:
        return self.inner.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.inner.load_state_dict(state_dict)


class Lookahead(torch.optim.Optimizer):
    """Slow weights lie in the state of the inner optimizer, as timm's Lookahead has them."""

    def __init__(self, parameters: Any) -> None:
        self.fast = torch.optim.Adam(parameters, lr=0.01)
        self.defaults = self.fast.defaults
        self.param_groups = self.fast.param_groups
        self.state = defaultdict(dict)
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = OrderedDict(), OrderedDict()
        self.count = 0
        for group in self.param_groups:
            group["steps"] = 0

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        loss = self.fast.step(closure)
        for group in self.param_groups:
            group["steps"] += 1
            if group["steps"] % 2 == 0:
                for parameter in group["params"]:
                    state = self.fast.state[parameter]
                    slow = state.setdefault("slow", parameter.clone())
                    slow.lerp_(parameter, 0.5)
                    parameter.copy_(slow)
        return loss

    def state_dict(self) -> Any:
        return self.fast.state_dict()

    def load_state_dict(self, state_dict: Any) -> None:
        self.fast.load_state_dict(state_dict)
        self.param_groups = self.fast.param_groups


class Sharpness(torch.optim.Optimizer):
    """As SAM: ``state_dict()`` is this one's own, and leaves out the state of the optimizer that it holds."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = torch.optim.SGD(self.param_groups, lr=0.05, momentum=0.9)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for parameter in group["params"]:
                kept = self.state[parameter].setdefault("seen", torch.zeros_like(parameter))
                kept.add_(parameter.grad, alpha=group["rho"])
                parameter.grad.add_(kept, alpha=0.01)
        return self.base_optimizer.step(closure)

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self.base_optimizer.param_groups = self.param_groups


class Precise(torch.optim.Optimizer):
    """Momentum in float32 for parameters in bfloat16."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                momentum = self.state[parameter].setdefault("momentum", torch.zeros(parameter.shape))
                momentum.mul_(0.9).add_(parameter.grad.float())
                parameter.add_(momentum, alpha=-group["lr"])


class Hidden(torch.optim.Optimizer):
    """Keeps its momentum where no caller looks, but ``state_dict()`` has it."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.05})
        self.kept = [torch.zeros_like(p) for group in self.param_groups for p in group["params"]]

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        parameters = [p for group in self.param_groups for p in group["params"]]
        for parameter, kept in zip(parameters, self.kept, strict=True):
            kept.mul_(0.9).add_(parameter.grad)
            parameter.add_(kept, alpha=-self.param_groups[0]["lr"])

    def state_dict(self) -> Any:
        return {**super().state_dict(), "state": {n: {"kept": kept} for n, kept in enumerate(self.kept)}, "name": "x"}

    def load_state_dict(self, state_dict: Any) -> None:
        assert state_dict["name"] == "x"
        for number, kept in enumerate(self.kept):
            kept.copy_(state_dict["state"][number]["kept"])


class Combined(torch.optim.Optimizer):
    """One optimizer for matrices and another one for the rest, in a list; ``state_dict()`` has no tensor of either."""

    def __init__(self, parameters: Any) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.hold(
            torch.optim.RMSprop([p for p in parameters if p.ndim > 1], lr=0.01, momentum=0.9),
            torch.optim.Adagrad([p for p in parameters if p.ndim < 2], lr=0.05),
        )
        self.param_groups = [group for part in self.held() for group in part.param_groups]

    def hold(self, *parts: torch.optim.Optimizer) -> None:
        self.parts: Any = list(parts)

    def held(self) -> list[torch.optim.Optimizer]:
        return list(self.parts)

    def step(self, closure: Any = None) -> None:
        for part in self.held():
            part.step()


class CombinedByName(Combined):
    """The same with a dict."""

    def hold(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = dict(zip(("matrices", "rest"), parts, strict=True))

    def held(self) -> list[torch.optim.Optimizer]:
        return list(self.parts.values())


KINDS = [Delegating, Lookahead, Sharpness, Precise, Hidden, Combined, CombinedByName]


def make(kind: Any, base_buffers: Any = "maintain", period: int = 4) -> tuple[nn.Module, Any]:
    torch.manual_seed(0)
    model = nn.Linear(3, 2, dtype=torch.bfloat16 if kind is Precise else torch.float32)
    return model, lt.SlowMo(kind(model.parameters()), model=model, period=period, base_buffers=base_buffers)


def _plain(kind: Any) -> tuple[nn.Module, Any]:
    model, optimizer = make(kind)
    return model, optimizer.base_optimizer


def train(model: nn.Module, optimizer: Any, steps: range, rank: int | None = None) -> None:
    """Take steps with the data of a rank, by default this one's."""
    dtype = next(model.parameters()).dtype
    seed = 100 * (lt.rank() if rank is None else rank)
    for step in steps:
        inputs = torch.randn(4, 3, generator=torch.Generator().manual_seed(seed + step)).to(dtype)
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()


def same(model: nn.Module, other: nn.Module) -> bool:
    return all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_training_resumes_bit_identically(kind: Any, shared_path: Path) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, range(5))
    lt.save(shared_path / "run", optimizer)
    state, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(model.state_dict())
    train(model, optimizer, range(5, 10))
    for steps_before in (0, 3):  # also one that has a state, which must go
        resumed, other = make(kind)
        train(resumed, other, range(steps_before))
        lt.load(shared_path / "run", other)
        train(resumed, other, range(5, 10))
        assert same(model, resumed)
    resumed, other = make(kind)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    train(resumed, other, range(5, 10))
    assert same(model, resumed)


@pytest.mark.parametrize("committed", [0, 5])
@pytest.mark.parametrize("kind", KINDS)
def test_an_elastic_state_is_restored_bit_identically(kind: Any, committed: int) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, range(committed))
    state = lt.elastic.TorchState(model, optimizer)
    train(model, optimizer, range(committed, 10))
    first = copy.deepcopy(model)
    state.restore()
    train(model, optimizer, range(committed, 10))
    assert same(first, model)


@pytest.mark.parametrize("kind", KINDS)
def test_a_broadcast_optimizer_continues_as_that_of_the_root(kind: Any) -> None:
    uninterrupted, root = _plain(kind)
    train(uninterrupted, root, range(6), rank=0)
    model, optimizer = _plain(kind)
    train(model, optimizer, range(3))
    lt.broadcast_parameters(model.state_dict(), root_rank=0)
    lt.broadcast_optimizer_state(optimizer, root_rank=0)
    train(model, optimizer, range(3, 6), rank=0)
    assert same(uninterrupted, model)


@pytest.mark.parametrize("kind", [Delegating, Lookahead, Sharpness])
def test_learning_rates_still_reach_the_inner_optimizer_after_loading(kind: Any, shared_path: Path) -> None:
    model, optimizer = make(kind)
    train(model, optimizer, range(3))
    lt.save(shared_path / "run", optimizer)
    other_model, other = make(kind)
    lt.load(shared_path / "run", other)
    for wrapped, own in ((optimizer, model), (other, other_model)):
        wrapped.param_groups[0]["lr"] = 0.001
        train(own, wrapped, range(3, 8))
    assert same(model, other_model)


@pytest.mark.parametrize("kind", [Delegating, Lookahead, Sharpness, Combined, CombinedByName])
def test_an_outer_step_resets_what_is_held_too(kind: Any) -> None:
    """After it, training continues as that of a wrapper made then."""
    model, optimizer = make(kind, "reset")
    train(model, optimizer, range(4))
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    fresh, other = make(kind, "reset", period=1000)
    fresh.load_state_dict(model.state_dict())
    for group, values in zip(other.param_groups, groups, strict=True):
        group.update(values)
    train(model, optimizer, range(4, 7))
    train(fresh, other, range(4, 7))
    assert same(model, fresh)


def test_a_reset_that_reaches_nothing_is_refused() -> None:
    model, optimizer = make(Hidden, "reset")
    with pytest.raises(lt.ConfigurationError, match="a Hidden keeps state elsewhere"):
        train(model, optimizer, range(4))


@pytest.mark.parametrize("kind", [Delegating, Lookahead, Sharpness, Combined])
def test_averaged_buffers_are_those_of_the_inner_optimizer_too(kind: Any) -> None:
    model, optimizer = make(kind, "average")
    train(model, optimizer, range(4))
    tensors = optimizer.training().optimizer_state().tensors
    assert any(by_name for by_name in tensors.values())
    for key, by_name in tensors.items():
        for name, array in by_name.items():
            everyone = lt.allgather(torch.tensor(array).reshape(1, -1))
            assert (everyone == everyone[0]).all(), (key, name)


def test_a_state_dict_of_an_optimizer_that_is_no_longer_held_is_refused() -> None:
    model, optimizer = make(Sharpness)
    train(model, optimizer, range(2))
    state = copy.deepcopy(optimizer.state_dict())
    _, other = make(Sharpness)
    other.base_optimizer.base_optimizer = None
    with pytest.raises(lt.ConfigurationError, match="an optimizer 'base_optimizer', which the saved Sharpness held"):
        other.load_state_dict(state)


def test_states_that_do_not_fit_are_refused(shared_path: Path) -> None:
    model, optimizer = make(Sharpness)
    train(model, optimizer, range(2))
    lt.save(shared_path / "run", optimizer)
    before = copy.deepcopy(model.state_dict())
    _, other = make(Sharpness)
    other.base_optimizer.base_optimizer = None
    with pytest.raises(lt.CheckpointError, match="held an optimizer 'base_optimizer'"):
        lt.load(shared_path / "run", other)
    torch.manual_seed(0)
    divided = nn.Linear(3, 2)
    groups = [{"params": [parameter]} for parameter in divided.parameters()]
    with pytest.raises(lt.CheckpointError, match="is of another model"):
        lt.load(shared_path / "run", lt.SlowMo(Sharpness(groups), model=divided, period=4, base_buffers="maintain"))
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
