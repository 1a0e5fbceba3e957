"""``SlowMo``, ``DiLoCo`` and ``AdaComm`` are classes, which their signatures, ``help`` and ``repr`` describe."""

import copy
import inspect
import pydoc
from collections.abc import Iterator
from typing import Any

import pytest
import torch

import lentando.torch as lt
from lentando.optimizers import ReplicaOptimizer, adacomm, diloco, slowmo

METHODS = {lt.SlowMo: slowmo, lt.DiLoCo: diloco, lt.AdaComm: adacomm, lt.DistributedOptimizer: lt.Settings}

HOROVODS = ["optimizer", "named_parameters", "compression", "backward_passes_per_step", "op"]
HOROVODS += ["gradient_predivide_factor", "num_groups", "groups", "sparse_as_dense", "process_set"]
"""Arguments of Horovod's ``DistributedOptimizer``, which may be positional."""


@pytest.fixture(autouse=True)
def job() -> Iterator[None]:
    lt.init()
    yield
    lt.shutdown()


def make(method: Any, **settings: Any) -> tuple[torch.nn.Linear, Any]:
    torch.manual_seed(0)
    model = torch.nn.Linear(2, 1)
    return model, method(torch.optim.SGD(model.parameters(), lr=0.125, momentum=0.5), model=model, **settings)


def train(model: torch.nn.Linear, optimizer: Any, steps: int) -> None:
    for step in range(steps):
        optimizer.zero_grad()
        model(torch.full([4, 2], 1.0 + step)).square().mean().backward()
        optimizer.step()


def test_a_method_is_a_class() -> None:
    for method in METHODS:
        _, optimizer = make(method)
        assert type(optimizer) is method
        assert isinstance(optimizer, lt.DistributedOptimizer)
        assert isinstance(optimizer, ReplicaOptimizer)
        assert isinstance(optimizer, torch.optim.Optimizer)
        assert {kind for kind in METHODS if isinstance(optimizer, kind)} == {method, lt.DistributedOptimizer}


@pytest.mark.parametrize("method", METHODS)
def test_signature_and_help_show_every_argument_with_its_documentation(method: Any) -> None:
    arguments = list(inspect.signature(method).parameters.values())
    shared = list(inspect.signature(METHODS[method]).parameters.values())
    own = arguments[: -len(shared)]
    if method is lt.DistributedOptimizer:
        positional = [one for one in own if one.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert [one.name for one in positional] == HOROVODS
        assert [one.name for one in own[len(positional) :]] == ["model"]
    else:
        assert [one.name for one in own] == ["optimizer", "model", "named_parameters", "process_set"]
        assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in own[1:])
    assert [(one.name, one.default) for one in arguments[-len(shared) :]] == [(one.name, one.default) for one in shared]
    assert all(one.kind is inspect.Parameter.KEYWORD_ONLY for one in arguments[-len(shared) :])
    text = pydoc.render_doc(method, renderer=pydoc.plaintext)
    for one in arguments:
        assert f" |      {one.name}: " in text, one.name
    assert "**settings" not in text
    assert " |  Example:" in text


def test_an_argument_that_the_method_does_not_have_is_an_error_that_names_the_method() -> None:
    with pytest.raises(TypeError, match=r"^AdaComm\(\) got an unexpected keyword argument 'interval'$"):
        make(lt.AdaComm, interval=60.0)
    with pytest.raises(TypeError, match=r"^SlowMo\(\) got an unexpected keyword argument 'outer'$"):
        make(lt.SlowMo, outer=lt.SlowMomentum())


def test_repr_names_the_method_its_settings_and_the_base_optimizer() -> None:
    _, optimizer = make(lt.SlowMo, period=4, on_nonfinite="skip")
    assert repr(optimizer).startswith(
        "SlowMo(base=LocalSGD(), outer=SlowMomentum(slow_lr=1.0, slow_momentum=0.5, nesterov=False), period=4, "
        "base_buffers='auto', on_nonfinite='skip', optimizer=SGD"
    )
    assert "optimizer=SGD(dampening=0, lr=0.125, " in repr(optimizer)
    assert "\n" not in repr(optimizer)
    assert repr(make(lt.DistributedOptimizer)[1]).startswith("DistributedOptimizer(base=AllReduce(")
    assert repr(make(lt.AdaComm)[1]).startswith("AdaComm(base=LocalSGD(), period=AdaptivePeriod(initial_period=16, ")


def test_state_of_a_distributed_optimizer_with_equal_settings_continues_in_the_methods_class() -> None:
    settings = {"base": lt.LocalSGD(), "outer": lt.SlowMomentum(), "period": 2, "base_buffers": "auto"}
    model, optimizer = make(lt.DistributedOptimizer, **settings)
    train(model, optimizer, 3)
    weights, state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    other, slowmo = make(lt.SlowMo, period=2)
    other.load_state_dict(weights)
    slowmo.load_state_dict(state)
    train(model, optimizer, 3)
    train(other, slowmo, 3)
    assert torch.equal(model.weight, other.weight)
    assert slowmo.report()["rounds"] == optimizer.report()["rounds"] == 3
