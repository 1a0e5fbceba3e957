"""A dropped optimizer is released at once, with all that it refers to, not when garbage is collected."""

import gc
from collections.abc import Iterator
from typing import Any
from weakref import ref

import pytest
import torch

import lentando.torch as lt


@pytest.fixture
def job_without_collector() -> Iterator[None]:
    lt.init()
    gc.collect()
    gc.disable()
    yield
    gc.enable()
    lt.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("base", [lt.AllReduce(), lt.LocalSGD(), lt.SGP()], ids=repr)
@pytest.mark.usefixtures("job_without_collector")
def test_a_dropped_optimizer_is_released_without_the_garbage_collector(base: Any) -> None:
    model = torch.nn.Linear(8, 8)
    optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, base=base, period=2)
    for _ in range(4):
        model(torch.ones(1, 8)).sum().backward()
        optimizer.step()
    replica = optimizer._replica
    kept = {name: ref(value) for name, value in {"setup": replica.setup, "framework": replica.framework}.items()}
    del optimizer, replica, model
    assert [name for name, value in kept.items() if value() is not None] == []
