"""What an outer step does to the base optimizer's state by default: SlowMo's authors keep that of Adam."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import lentando.torch as lt

RESET: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9),
    "nesterov": lambda p: torch.optim.SGD(p, lr=0.01, momentum=0.9, nesterov=True),
}
MAINTAINED: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": torch.optim.Adam,
    "adamw": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "nadam": torch.optim.NAdam,
    "radam": torch.optim.RAdam,
    "adamax": torch.optim.Adamax,
    "adagrad": torch.optim.Adagrad,
    "adadelta": torch.optim.Adadelta,
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5),
    "adafactor": torch.optim.Adafactor,
    "groups": lambda p: torch.optim.Adam([{"params": [one], "lr": 0.01} for one in p]),
}


def train(wrap: Callable[..., lt.DistributedOptimizer], make: Any, steps: int = 2, **options: Any) -> Any:
    model = nn.Linear(3, 2)
    own = make(model.parameters())
    optimizer = wrap(own, model=model, **options)
    for step in range(steps):
        optimizer.zero_grad()
        loss = model(torch.full((2, 3), 1.0 + lt.rank() + step)).square().mean()
        loss.backward()
        optimizer.step(loss=loss)
    return own.state


@pytest.mark.parametrize("name", MAINTAINED)
def test_state_of_optimizers_with_second_moments_stays(name: str) -> None:
    assert all(train(lt.SlowMo, MAINTAINED[name], period=2).values())
    assert all(train(lt.AdaComm, MAINTAINED[name], initial_period=2, slow_momentum=0.3).values())


@pytest.mark.parametrize("name", RESET)
def test_state_of_others_begins_again_under_slow_momentum(name: str) -> None:
    assert not any(train(lt.SlowMo, RESET[name], period=2).values())
    assert not any(train(lt.AdaComm, RESET[name], initial_period=2, slow_momentum=0.3).values())


@pytest.mark.parametrize("name", [*MAINTAINED, *RESET])
def test_other_methods_keep_it(name: str) -> None:
    make = {**MAINTAINED, **RESET}[name]
    assert all(train(lt.DistributedOptimizer, make, base=lt.LocalSGD(), period=2).values())
    assert all(train(lt.AdaComm, make, initial_period=2).values())
    assert all(train(lt.DiLoCo, make, period=2).values())


def test_what_is_asked_for_is_done() -> None:
    assert not any(train(lt.SlowMo, MAINTAINED["adam"], period=2, base_buffers="reset").values())
    assert all(train(lt.SlowMo, RESET["sgd"], period=2, base_buffers="maintain").values())
    automatic = train(
        lt.DistributedOptimizer,
        RESET["sgd"],
        base=lt.LocalSGD(),
        outer=lt.SlowMomentum(),
        period=2,
        base_buffers="auto",
    )
    assert not any(automatic.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["adam", "adamw", "nadam", "radam", "adamax", "rmsprop"])
def test_optimizers_of_torch_move_parameters_of_16_bits(name: str, dtype: torch.dtype) -> None:
    """Those of Keras do not, and are warned of."""
    parameter = nn.Parameter(torch.ones(4, dtype=dtype))
    own = MAINTAINED[name]([parameter])
    for group in own.param_groups:
        group["lr"] = 0.1
    optimizer = lt.DistributedOptimizer(own)
    for _ in range(10):
        parameter.grad = parameter.detach().clone()
        optimizer.step()
    assert parameter.isfinite().all()
    assert (parameter < 0.95).all()
