"""A wrapper is a ``torch.optim.Optimizer`` in all its public attributes: each works, or is refused with a reason."""

import copy
import inspect
import io
import pickle  # noqa: TID251 - which is refused
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

METHODS: dict[str, dict[str, Any]] = {
    "AllReduce": {},
    "LocalSGD": {"base": lt.LocalSGD(), "period": 2, "outer": lt.SlowMomentum()},
    "SGP": {"base": lt.SGP(), "period": 3},
}


def make(kind: type[torch.optim.Optimizer] = torch.optim.SGD, **options: Any) -> tuple[nn.Linear, Any]:
    torch.manual_seed(0)
    model = nn.Linear(4, 1)
    base = kind(model.parameters(), lr=0.1)  # type: ignore[call-arg]
    return model, lt.DistributedOptimizer(base, model=model, **options)


def batch(step: int) -> torch.Tensor:
    return torch.randn(8, 4, generator=torch.Generator().manual_seed(100 * lt.rank() + step))


def loss_of(model: nn.Module, step: int) -> torch.Tensor:
    loss: torch.Tensor = model(batch(step)).square().mean()
    return loss


def train(model: nn.Module, optimizer: Any, steps: range) -> None:
    for step in steps:
        optimizer.zero_grad()
        loss_of(model, step).backward()
        optimizer.step()


SURFACE = {
    "OptimizerPreHook": "a type",
    "OptimizerPostHook": "a type",
    "profile_hook_step": "a static method, which the wrapper does not use",
    "add_param_group": "tested in test_unfreezing.py",
    "load_state_dict": "tested here, and in test_checkpoints.py",
    "state_dict": "tested here, and in test_checkpoints.py",
    "register_load_state_dict_post_hook": "tested here",
    "register_load_state_dict_pre_hook": "tested here",
    "register_state_dict_post_hook": "tested here",
    "register_state_dict_pre_hook": "tested here",
    "register_step_post_hook": "tested here",
    "register_step_pre_hook": "tested here",
    "step": "tested everywhere",
    "zero_grad": "tested everywhere",
    "defaults": "tested here",
    "state": "tested here",
    "param_groups": "tested here",
}


def test_every_public_attribute_is_accounted_for() -> None:
    """A newer torch that adds one fails here."""
    _, optimizer = make()
    plain = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    public = {name for name in dir(plain) if not name.startswith("_")}
    assert public == SURFACE.keys()
    for name in public:
        assert inspect.isroutine(getattr(optimizer, name)) == inspect.isroutine(getattr(plain, name)), name


def test_a_method_of_the_base_optimizers_class_is_refused_with_the_way_to_call_it() -> None:
    class WithRate(torch.optim.SGD):
        def get_lr(self) -> float:
            return float(self.param_groups[0]["lr"])

    _, optimizer = make(WithRate)
    with pytest.raises(AttributeError, match=r"no attribute 'get_lr': .* optimizer\.base_optimizer\.get_lr"):
        optimizer.get_lr()
    assert optimizer.base_optimizer.get_lr() == 0.1
    with pytest.raises(AttributeError, match="no attribute 'neither'$"):
        _ = optimizer.neither


def test_hooks_of_a_plain_optimizer_and_of_a_wrapper_are_called_alike() -> None:
    def observed(optimizer: Any, model: nn.Module) -> list[Any]:
        calls: list[Any] = []

        def note(what: str, result: Callable[..., Any] = lambda *_: None) -> Callable[..., Any]:
            def hook(*arguments: Any) -> Any:
                calls.append((what, len(arguments)))
                return result(*arguments)

            return hook

        handles = [
            optimizer.register_step_pre_hook(note("step pre")),
            optimizer.register_step_post_hook(note("step post")),
            optimizer.register_state_dict_pre_hook(note("state pre")),
            optimizer.register_state_dict_pre_hook(note("state pre, prepended"), prepend=True),
            optimizer.register_state_dict_post_hook(note("state post", lambda _, state: {**state, "added": 1})),
            optimizer.register_load_state_dict_pre_hook(
                note("load pre", lambda _, state: {key: value for key, value in state.items() if key != "added"})
            ),
            optimizer.register_load_state_dict_post_hook(note("load post")),
        ]
        loss_of(model, 0).backward()
        optimizer.step()
        state = optimizer.state_dict()
        calls.append(state["added"])
        optimizer.load_state_dict(state)
        assert state["added"] == 1  # the hook was given a copy
        for handle in handles:
            handle.remove()
        calls.append("added" in optimizer.state_dict())
        return calls

    model, optimizer = make()
    plain = nn.Linear(4, 1)
    assert observed(optimizer, model) == observed(torch.optim.SGD(plain.parameters(), lr=0.1), plain)


def test_state_dict_hooks_are_given_the_wrapper_and_its_whole_state() -> None:
    _, optimizer = make()
    seen: list[Any] = []
    optimizer.register_state_dict_post_hook(lambda who, state: seen.append((who, "lentando" in state)))
    optimizer.register_load_state_dict_post_hook(seen.append)
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [(optimizer, True), optimizer]


def test_assigned_attributes_become_the_base_optimizers() -> None:
    model, optimizer = make(**METHODS["LocalSGD"])
    base = optimizer.base_optimizer
    train(model, optimizer, range(1))
    groups = [{**optimizer.param_groups[0], "lr": 0.25}]
    optimizer.param_groups = groups
    assert base.param_groups is groups
    before = model.weight.detach().clone()
    model.weight.grad = torch.ones_like(model.weight)
    model.bias.grad = None
    optimizer.step()  # an outer step with slow momentum 0.5, whose first equals the average
    assert torch.allclose(model.weight, _mean(before) - 0.25)
    state = {parameter: {"momentum_buffer": None} for parameter in model.parameters()}
    optimizer.state = state
    assert base.state is state
    defaults = {**optimizer.defaults, "lr": 0.5}
    optimizer.defaults = defaults
    assert base.defaults is defaults
    for wrong in ([{"lr": 0.1}], {"params": []}, [[]]):
        with pytest.raises(lt.ConfigurationError, match="param_groups must be a list of dicts"):
            optimizer.param_groups = wrong


@pytest.mark.parametrize(
    "copied",
    [copy.deepcopy, copy.copy, pickle.dumps, lambda what: torch.save(what, io.BytesIO())],
    ids=["deepcopy", "copy", "pickle", "torch.save"],
)
def test_copies_are_refused_and_leave_other_wrappers_as_they_were(copied: Callable[[Any], Any]) -> None:
    _, optimizer = make(**METHODS["LocalSGD"])
    model, other = make(**METHODS["LocalSGD"])
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    for what in (optimizer, [optimizer], *([] if copied is copy.copy else [scheduler])):
        if copied is copy.copy and what is not optimizer:
            continue
        with pytest.raises(lt.ConfigurationError, match="cannot be copied or pickled"):
            copied(what)
    with pytest.raises(lt.ConfigurationError, match="cannot be unpickled"):
        lt.DistributedOptimizer.__new__(lt.DistributedOptimizer).__setstate__({})
    train(model, other, range(3))
    assert other.report()["inner_steps"] == 3
    first, base = copy.deepcopy((model, other.base_optimizer))  # as the message advises
    assert base.param_groups[0]["params"][0] is first.weight
    assert first.weight.data_ptr() != model.weight.data_ptr()


@pytest.mark.filterwarnings("default")  # of torch's compiler, about itself
@pytest.mark.parametrize(
    ("method", "compiled"), [("AllReduce", "all"), ("LocalSGD", "all"), ("SGP", "all"), ("LocalSGD", "step")]
)
def test_compiled_steps_give_the_same_weights(method: str, compiled: str) -> None:
    expected, optimizer = make(**METHODS[method])
    train(expected, optimizer, range(5))
    model, optimizer = make(**METHODS[method])
    torch.compiler.reset()

    def whole(inputs: torch.Tensor) -> None:
        optimizer.zero_grad()
        loss = model(inputs).square().mean()
        loss.backward()
        optimizer.step(loss=loss)

    take_step = torch.compile(optimizer.step if compiled == "step" else whole, backend="eager")
    for step in range(5):
        if compiled == "all":
            take_step(batch(step))
        else:
            optimizer.zero_grad()
            loss_of(model, step).backward()
            take_step()
    assert optimizer.report()["inner_steps"] == 5
    assert torch.equal(model.weight, expected.weight)
    torch.compiler.reset()


class ScheduleFree(torch.optim.Optimizer):
    """SGD with other weights for evaluation (x) than for training (y), as Defazio et al.'s (arXiv 2405.15682)."""

    beta = 0.75

    def __init__(self, parameters: Any, lr: float) -> None:
        super().__init__(parameters, {"lr": lr, "train_mode": True})

    def _move(self, share: float, train_mode: bool) -> None:
        for group in self.param_groups:
            if group["train_mode"] != train_mode:
                for parameter in group["params"]:
                    if parameter in self.state:
                        parameter.data.lerp_(self.state[parameter]["z"], share)
                group["train_mode"] = train_mode

    def train(self) -> None:
        self._move(1 - self.beta, train_mode=True)

    def eval(self) -> None:
        self._move(1 - 1 / self.beta, train_mode=False)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            assert group["train_mode"], "step() in evaluation mode"
            for parameter in group["params"]:
                state = self.state[parameter]
                state.setdefault("z", parameter.clone())
                parameter.lerp_(state["z"], 0.5)
                parameter.add_(parameter.grad, alpha=-group["lr"] * (1 - self.beta * 0.5))
                state["z"].sub_(parameter.grad, alpha=group["lr"])


@pytest.mark.parametrize("method", METHODS)
def test_weights_for_evaluation_are_averaged_and_training_continues(method: str) -> None:
    expected, reference = make(ScheduleFree, **METHODS[method])
    train(expected, reference, range(6))
    model, optimizer = make(ScheduleFree, **METHODS[method])
    train(model, optimizer, range(4))
    in_training = model.weight.detach().clone()
    optimizer.eval()
    assert not torch.equal(model.weight, in_training)
    own = model.weight.detach().clone()
    with optimizer.averaged():
        averaged = model.weight.detach().clone()
        with pytest.raises(lt.ConfigurationError, match=r"train\(\) is not possible inside averaged"):
            optimizer.train()
    assert torch.allclose(model.weight, own)
    if method != "SGP":  # where the average is of the biased parameters
        assert torch.allclose(averaged, _mean(own))
    optimizer.train()
    assert torch.allclose(model.weight, in_training)
    train(model, optimizer, range(4, 6))
    assert torch.allclose(model.weight, expected.weight, atol=1e-6)


def test_modes_are_passed_on_only_where_the_base_optimizer_has_them() -> None:
    _, optimizer = make()
    assert not hasattr(optimizer, "train")
    assert not hasattr(optimizer, "eval")
    with pytest.raises(AttributeError, match="'DistributedOptimizer' object has no attribute 'first_step'"):
        optimizer.first_step()


def _mean(tensor: torch.Tensor) -> torch.Tensor:
    mean: torch.Tensor = lt.allgather(tensor.detach().reshape(1, -1)).mean(dim=0).reshape(tensor.shape)
    return mean
