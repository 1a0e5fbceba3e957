"""Settings and models that are refused with a message that names the cause (O26)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch_training import net, sgd, train

import lentando.torch as lt


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
    [
        lambda model: model.double(),
        lambda model: setattr(model.weight, "data", model.weight.data.clone()),
        lambda model: torch.utils.swap_tensors(model.weight, nn.Parameter(model.weight.detach().to_sparse())),
    ],
    ids=["converted", "rebound", "swapped for one without memory"],
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
        ({"algorithm": "tree"}, "algorithm must be one of 'auto', 'measured', 'ring', 'backend', got 'tree'"),
    ],
)
def test_impossible_settings_are_refused(options: dict[str, Any], text: str) -> None:
    """O26."""
    with pytest.raises(lt.ConfigurationError, match=text):
        lt.SlowMo(sgd(net()), **options)


def test_local_sgd_without_period_is_refused() -> None:
    with pytest.raises(lt.ConfigurationError, match="the replicas would never communicate"):
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


@pytest.mark.parametrize("wrap", [lt.DistributedOptimizer, lt.SlowMo, lt.AdaComm, lt.DiLoCo])
@pytest.mark.parametrize("model", [net(), nn.Sequential(nn.Linear(4, 5))], ids=["own class", "sequential"])
def test_a_model_that_is_not_passed_by_its_name_is_refused(wrap: Any, model: nn.Module) -> None:
    with pytest.raises(lt.ConfigurationError, match="A model is passed by its name: model=model"):
        wrap(sgd(model), model)
    with pytest.raises(
        lt.ConfigurationError, match=r"expected a torch\.optim\.Optimizer to wrap, got (Net|Sequential)"
    ):
        wrap(model, sgd(model))


@pytest.mark.parametrize("kind", ["parameters", "state", "list", "class"])
def test_something_else_than_a_model_is_refused(kind: str) -> None:
    model = net()
    others = {"parameters": model.parameters(), "state": model.state_dict(), "list": [model], "class": type(model)}
    named = {"parameters": "generator", "state": "OrderedDict", "list": "list", "class": "the class Net itself"}
    text = rf"model= must be the torch\.nn\.Module that this optimizer trains, or be left out, got {named[kind]}"
    with pytest.raises(lt.ConfigurationError, match=text):
        lt.SlowMo(sgd(model), model=others[kind])  # type: ignore[arg-type]


@pytest.mark.parametrize("loss", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_a_loss_that_is_not_passed_by_its_name_is_refused(loss: Any) -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model, period=2)
    with pytest.raises(
        lt.ConfigurationError, match=r"got (float|Tensor)\. A loss is passed by its name: step\(loss=loss"
    ):
        optimizer.step(loss)
    assert optimizer.report()["inner_steps"] == 0
    train(optimizer, model, 2)
    assert optimizer.rounds == 1


def test_non_finite_parameters_are_refused_by_name_and_rank() -> None:
    model = net()
    optimizer = lt.SlowMo(sgd(model), model=model, period=2)
    train(optimizer, model, 1)
    if lt.rank() == lt.size() - 1:
        with torch.no_grad():
            model.out.bias[1] = float("nan")
    with pytest.raises(lt.NonFiniteError, match=rf"rank {lt.size() - 1}: 'out\.bias' is not finite"):
        optimizer.step()
