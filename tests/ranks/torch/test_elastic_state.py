"""``lentando.torch.elastic`` on any number of ranks, none of which dies."""

from typing import Any

import numpy as np
import pytest
import torch

import lentando.torch as lt

NEXT = 1 + 0.75
"""The momentum after two gradients of 1, with a coefficient whose products are exact."""


def model_of(value: float) -> torch.nn.Module:
    model = torch.nn.Linear(2, 2)
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, value)
    return model


def values(model: torch.nn.Module) -> set[float]:
    return {value for parameter in model.parameters() for value in parameter.detach().flatten().tolist()}


def step(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()


def test_sync_gives_all_ranks_the_state_of_rank_0_and_restore_returns_to_it() -> None:
    rank = lt.rank()
    model = model_of(1.0 + rank)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5 + rank, momentum=0.75)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.1 * (rank + 1))
    step(model, optimizer)
    state = lt.elastic.TorchState(model, optimizer, scheduler=scheduler, epoch=10 + rank, seen=[rank], table={"a": 1})
    state.sync()
    assert values(model) == {0.5}  # 1 - 0.5 * a gradient of 1, rank 0's
    assert optimizer.param_groups[0]["lr"] == 0.5
    assert scheduler.gamma == 0.1
    assert (state.epoch, state.seen, state.table) == (10, [0], {"a": 1})

    step(model, optimizer)
    state.epoch = 11
    state.seen.append(7)
    state.table["a"] = 2
    scheduler.gamma = 5.0
    assert values(model) == {0.5 - 0.5 * NEXT}
    state.restore()
    assert values(model) == {0.5}
    assert (state.epoch, state.seen, state.table, scheduler.gamma) == (10, [0], {"a": 1}, 0.1)
    step(model, optimizer)  # the momentum has been restored, too
    assert values(model) == {0.5 - 0.5 * NEXT}
    state.epoch = 12
    state.commit()
    step(model, optimizer)
    state.restore()
    assert values(model) == {0.5 - 0.5 * NEXT}
    assert state.epoch == 12


@pytest.mark.parametrize(
    "settings",
    [{}, {"base": lt.LocalSGD(), "period": 3, "outer": lt.SlowMomentum(1.0, 0.5)}],
    ids=["allreduce", "slowmo"],
)
def test_training_that_is_restored_repeats_the_same_steps(settings: dict[str, Any]) -> None:
    torch.manual_seed(lt.rank())
    model = torch.nn.Linear(3, 1, dtype=torch.float64)
    sgd = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = lt.DistributedOptimizer(sgd, model=model, base_buffers="maintain", **settings)
    state = lt.elastic.TorchState(model=model, optimizer=optimizer, step=0)

    def train(until: int) -> list[float]:
        while state.step < until:
            torch.manual_seed(100 * state.step + lt.rank())
            optimizer.zero_grad()
            model(torch.randn(4, 3, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            state.step += 1
        with optimizer.averaged():
            return [value for p in model.parameters() for value in p.detach().flatten().tolist()]

    train(4)
    state.commit()
    if "base" in settings:  # replicas differ here: from now on, they are rank 0's
        state.sync()
    first = train(11)
    assert optimizer.report()["inner_steps"] == 11
    state.restore()
    if "base" in settings:
        state.sync()
    assert (state.step, optimizer.report()["inner_steps"]) == (4, 4)
    assert train(11) == first
    assert optimizer.report()["rounds"] == (11 // 3 if "period" in settings else 0)


def test_another_object_in_place_of_an_attribute_is_saved() -> None:
    state = lt.elastic.TorchState(model=model_of(1.0))
    other = state.model = model_of(3.0)
    torch.nn.init.constant_(other.bias, 4.0)
    state.restore()
    assert state.model is other
    assert values(other) == {3.0}


def test_object_that_cannot_be_sent_is_refused_on_every_rank() -> None:
    state = lt.elastic.TorchState(model=model_of(1.0), thing=object() if lt.rank() == 0 else 1)
    with pytest.raises(lt.ConfigurationError, match=r"on rank 0: .*'thing'.* is a object"):
        state.sync()


def test_sampler_divides_what_is_left_of_an_epoch_among_the_present_ranks() -> None:
    size, rank = lt.size(), lt.rank()
    sampler = lt.elastic.ElasticSampler(range(6 * size + 1), seed=3)
    state = lt.elastic.TorchState(sampler=sampler)
    by_rank = lt.allgather_object(list(sampler))
    assert [len(indices) for indices in by_rank] == [7] * size
    assert {index for indices in by_rank for index in indices} == set(range(6 * size + 1))
    order = [by_rank[number % size][number // size] for number in range(7 * size)]
    sampler.record_batch(0, 2)
    sampler.record_batch(1, 3)
    assert list(sampler) == by_rank[rank]  # unchanged within the epoch
    state.commit()
    state.sync()
    assert sampler.processed_num == 5 * size
    left = lt.allgather_object(list(sampler))
    assert [left[number % size][number // size] for number in range(size + 1)] == order[5 * size : 6 * size + 1]
    assert len(sampler) == 2
    sampler.set_epoch(1)
    assert sampler.processed_num == 0
    state.restore()
    assert (sampler.epoch, sampler.processed_num) == (0, 5 * size)
    plain = lt.elastic.ElasticSampler(range(2 * size), shuffle=False)
    assert list(plain) == [rank, rank + size]


def test_run_synchronizes_calls_and_calls_again_after_an_interrupt() -> None:
    state = lt.elastic.TorchState(value=np.array([lt.rank() + 1]), calls=0)
    resets: list[int] = []
    state.register_reset_callbacks([lambda: resets.append(lt.size())])

    @lt.elastic.run
    def train(state: lt.elastic.TorchState, more: int, *, factor: int) -> int:
        state.calls += 1
        if state.calls < 3:
            raise lt.HostsUpdatedInterrupt(skip_sync=state.calls == 2)
        return int(state.value[0]) * factor + more

    assert train(state, 3, factor=10) == 13
    assert (state.calls, resets) == (3, [lt.size()] * 2)
    assert train.__name__ == "train"


def test_error_of_the_function_is_raised() -> None:
    @lt.elastic.run
    def train(state: lt.elastic.TorchState) -> None:
        raise ValueError("no elastic matter")

    with pytest.raises(ValueError, match="no elastic matter"):
        train(lt.elastic.TorchState(x=1))
