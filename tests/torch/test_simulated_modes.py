"""Modes of torch that one simulated rank has entered are no other rank's, as in separate processes."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch

import lentando.torch as lt
from lentando.comm import simulate

BLOCKS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "autocast without cache": lambda: torch.autocast("cpu", torch.float16, cache_enabled=False),
}


def modes() -> list[Any]:
    torch.autocast_increment_nesting()
    return [
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_autocast_dtype("cpu"),
        torch.is_autocast_cache_enabled(),
        torch.autocast_decrement_nesting(),
    ]


@pytest.mark.parametrize("name", BLOCKS)
def test_a_mode_belongs_to_the_rank_that_has_entered_it(name: str) -> None:
    with BLOCKS[name]():
        inside = modes()
    outside = modes()
    assert inside != outside

    def work() -> None:
        lt.init()
        for turn in range(4):
            is_inside = lt.rank() == turn % lt.size()
            with BLOCKS[name]() if is_inside else nullcontext():
                for _ in range(2):
                    assert modes() == (inside if is_inside else outside)
                    lt.barrier()
            assert modes() == outside
        lt.shutdown()

    simulate(work, 3)
    assert modes() == outside


@pytest.mark.parametrize("block", [torch.no_grad, torch.inference_mode])
def test_ranks_train_on_while_one_evaluates(block: Callable[[], AbstractContextManager[Any]]) -> None:
    """Rank 0 waits in the average, inside the block, while the others still compute gradients."""

    def train() -> torch.Tensor:
        lt.init()
        torch.manual_seed(1)
        model = torch.nn.Linear(3, 1)
        optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), 0.1), model=model, period=2)
        for _ in range(2):
            for _ in range(3):
                optimizer.zero_grad()
                model(torch.full((2, 3), 1.0 + lt.rank())).square().mean().backward()
                optimizer.step()
            with block(), optimizer.averaged():
                assert not model(torch.ones(1, 3)).requires_grad
        lt.shutdown()
        return model.weight.detach().clone()

    first, *others = simulate(train, 3)
    assert all(torch.equal(first, weight) for weight in others)
    with block():
        before = modes()
        simulate(train, 3)  # each rank begins as a process of its own
        assert modes() == before
