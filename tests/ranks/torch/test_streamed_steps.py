"""Outer steps with delay, fragments and blend in PyTorch: against the reference, and with what else a program does."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose, assert_array_equal
from torch_training import DIMENSION, QUADRATIC, START, net, set_gradient, sgd, train, train_vector, vector

import lentando.torch as lt

RATE, PERIOD, STEPS = 0.05, 3, 13


@pytest.mark.parametrize("blend", [None, 0.5])
@pytest.mark.parametrize("delay", [1, PERIOD])
def test_slowmo_equals_the_reference(delay: int, blend: float | None) -> None:
    model = vector()
    optimizer = lt.SlowMo(
        sgd(model, momentum=0.9), model=model, period=PERIOD, slow_momentum=0.6, delay=delay, blend=blend
    )
    rule = (1.0, 0.6, 0.9, "reset", False, delay, blend)
    expected = reference.delayed_slowmo(lt.size(), STEPS, START, QUADRATIC, PERIOD, lambda step: RATE, *rule)
    assert_allclose(train_vector(optimizer, model, STEPS), expected[lt.rank()], rtol=0, atol=1e-13)
    report = optimizer.report()
    assert (report["delay"], report["fragments"], report["rounds"]) == (delay, 1, STEPS // PERIOD)


def test_co2_equals_the_reference_and_resumes_bit_identically() -> None:
    settings: dict[str, Any] = {"period": PERIOD, "slow_momentum": 0.6, "delay": PERIOD, "base_buffers": "reset"}
    settings |= {"gap_penalty": 2.0, "momentum_clip": 0.5}
    model = vector()
    optimizer = lt.SlowMo(sgd(model), model=model, **settings)
    found = train_vector(optimizer, model, STEPS)
    rule = (1.0, 0.6, 0.9, "reset", False, PERIOD, None, 2.0, 0.5)
    expected = reference.delayed_slowmo(lt.size(), STEPS, START, QUADRATIC, PERIOD, lambda step: RATE, *rule)
    assert_allclose(found, expected[lt.rank()], rtol=0, atol=1e-13)
    resumed = vector()
    again = lt.SlowMo(sgd(resumed), model=resumed, **settings)
    resumed.load_state_dict(model.state_dict())
    again.load_state_dict(deepcopy(optimizer.state_dict()))  # PyTorch would share its tensors
    assert_array_equal(train_vector(again, resumed, STEPS), train_vector(optimizer, model, STEPS))


def test_a_delay_that_is_chosen_is_shown() -> None:
    model = vector()
    optimizer = lt.SlowMo(sgd(model), model=model, period=PERIOD, slow_momentum=0.6, delay="auto")
    train_vector(optimizer, model, 4 * PERIOD)
    assert optimizer.report()["delay"] is None
    train_vector(optimizer, model, PERIOD)
    delays = lt.allgather_object(optimizer.report()["delay"])
    assert delays == [delays[0]] * lt.size()
    assert delays[0] in range(PERIOD + 1)
    assert delays[0] == 0 or optimizer.report()["is_overlapped"]


class TwoVectors(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        first, second = torch.from_numpy(START[:6].copy()), torch.from_numpy(START[6:].copy())
        self.first, self.second = torch.nn.Parameter(first), torch.nn.Parameter(second)

    @property
    def whole(self) -> Any:
        return np.concatenate([self.first.detach().numpy(), self.second.detach().numpy()])


def test_diloco_in_fragments_equals_the_reference() -> None:
    model = TwoVectors()
    inner = torch.optim.SGD(model.parameters(), lr=RATE)
    optimizer = lt.DiLoCo(inner, model=model, period=4, outer_lr=0.7, outer_momentum=0.9, delay=2, fragments=2)
    for step in range(STEPS):
        gradient = torch.from_numpy(QUADRATIC(lt.rank(), step, model.whole))
        model.first.grad, model.second.grad = gradient[:6], gradient[6:]
        optimizer.step()
    fragments = [(slice(0, 6), 2), (slice(6, DIMENSION), 4)]
    expected = reference.streaming_diloco(
        lt.size(), STEPS, START, QUADRATIC, lambda step: RATE, fragments, 4, 2, 0.7, 0.9, nesterov=True
    )
    assert_allclose(model.whole, expected[lt.rank()], rtol=0, atol=1e-13)


def streamed(seed: int = 0, **settings: Any) -> tuple[lt.DistributedOptimizer, Any]:
    model = net(seed)
    optimizer = lt.SlowMo(sgd(model), model=model, **{"period": 4, "delay": 3, "slow_momentum": 0.5, **settings})
    return optimizer, model


@pytest.mark.parametrize("settings", [{}, {"fragments": 3}, {"fragments": 2, "delay": 1, "blend": 0.5}], ids=str)
def test_a_state_dict_continues_bit_identically_at_every_step(settings: dict[str, Any], tmp_path: Path) -> None:
    """Not collective: it waits for what this rank has in flight alone."""
    optimizer, model = streamed(**settings)
    saved: list[Any] = []
    for step in range(9):
        weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        torch.save(optimizer.state_dict(), tmp_path / "state.pt")
        saved.append((weights, torch.load(tmp_path / "state.pt", weights_only=True)))
        train(optimizer, model, 1, step)
    for step, (weights, state) in enumerate(saved):
        again, resumed = streamed(7, **settings)
        resumed.load_state_dict(weights)
        again.load_state_dict(state)
        train(again, resumed, 9 - step, step)
        for name, tensor in resumed.state_dict().items():
            assert torch.equal(tensor, model.state_dict()[name]), (step, name)


def test_statistics_of_a_model_are_the_average_and_stay_variances() -> None:
    optimizer, model = streamed()
    train(optimizer, model, 7)
    found = np.array(lt.allgather_object(model.norm.running_var.tolist()))
    assert_array_equal(found, np.tile(found[0], (lt.size(), 1)))
    assert (found > 0).all()


def test_parameters_that_are_frozen_while_an_average_is_in_flight() -> None:
    """What is in flight is adopted first; the next outer step is of the parameters that are left."""
    optimizer, model = streamed(fragments=2)
    train(optimizer, model, 5)
    for parameter in model.conv.parameters():
        parameter.requires_grad_(False)
    train(optimizer, model, 8, first=5)
    frozen = np.array(lt.allgather_object(model.conv.weight.flatten().tolist()))
    assert_array_equal(frozen, np.tile(frozen[0], (lt.size(), 1)))
    assert optimizer.report()["rounds"] == 3


def test_saving_changes_nothing(shared_path: Path) -> None:
    """It waits for what is in flight, and leaves it there."""
    optimizer, model = streamed(fragments=2)
    other, same = streamed(fragments=2)
    train(other, same, 9)
    for step in range(9):
        lt.save(shared_path / "it", optimizer)
        train(optimizer, model, 1, step)
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, same.state_dict()[name]), name


def test_half_precision() -> None:
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4).to(torch.bfloat16)
    optimizer = lt.SlowMo(
        torch.optim.SGD(model.parameters(), lr=0.05), model=model, period=4, delay=2, slow_momentum=0.5
    )
    for step in range(10):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + lt.rank())).to(torch.bfloat16)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    anchors = optimizer.state_dict()["lentando"]["outer"]["anchors"]["flat"][0]
    assert torch.equal(anchors, anchors.to(torch.bfloat16).float())
    everyones = lt.allgather_object(anchors.tolist())
    assert all(one == everyones[0] for one in everyones)


def test_set_weights_are_kept() -> None:
    model = vector()
    optimizer = lt.SlowMo(sgd(model, lr=0.0), model=model, period=PERIOD, delay=2)
    for step in range(PERIOD + 1):
        set_gradient(model, step)
        optimizer.step()
    with torch.no_grad():
        model.weight.fill_(2.0)
    assert (train_vector(optimizer, model, 2 * PERIOD) == 2.0).all()


ENDINGS: list[dict[str, Any]] = [
    {"delay": 2},
    {"fragments": 2, "delay": 1, "blend": 0.5},
    {"delay": 0},
    {"delay": 0, "base": lt.OSGP()},
    {"delay": 0, "base": lt.AllReduce()},
]


@pytest.mark.parametrize("steps", [8, 9])
@pytest.mark.parametrize("settings", ENDINGS, ids=str)
def test_training_ends_with_what_averaged_shows(settings: dict[str, Any], steps: int) -> None:
    """Outer steps in flight and gossip messages in flight included; on a single rank, too."""
    optimizer, model = streamed(**settings)
    train(optimizer, model, steps)
    own = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with optimizer.averaged():
        shown = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer.adopt_average()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, shown[name]), name
    assert lt.size() == 1 or optimizer.consensus_distance() == 0
    if settings["delay"] and steps == 8:  # the outer step in flight moves the weights even of a single rank
        assert any(not torch.equal(tensor, shown[name]) for name, tensor in own.items())
    optimizer.adopt_average()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, shown[name]), name


def test_the_average_of_equal_replicas_leaves_momentum_and_round_alone() -> None:
    optimizer, model = streamed(delay=0, base=lt.AllReduce())
    twin, other = streamed(delay=0, base=lt.AllReduce())
    train(optimizer, model, 4)
    train(twin, other, 4)
    optimizer.adopt_average()
    train(optimizer, model, 5, 4)
    train(twin, other, 5, 4)
    for name, tensor in other.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name


def test_adopting_the_average_is_refused_in_averaged_and_in_join() -> None:
    optimizer, _ = streamed(delay=0)
    with (
        optimizer.averaged(),
        pytest.raises(lt.ConfigurationError, match=r"adopt_average\(\) is not .* inside averaged"),
    ):
        optimizer.adopt_average()
    with lt.join(optimizer), pytest.raises(lt.ConfigurationError, match=r"adopt_average\(\) is not .* inside join"):
        optimizer.adopt_average()


def test_averaged_keeps_weights_that_were_set_while_an_average_is_in_flight() -> None:
    optimizer, model = streamed(delay=3)
    train(optimizer, model, 5)
    best = {name: tensor.clone() for name, tensor in net(7).state_dict().items()}
    model.load_state_dict(best)
    with optimizer.averaged():
        for name, tensor in model.state_dict().items():
            torch.testing.assert_close(tensor, best[name], rtol=0, atol=0)
    optimizer.adopt_average()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, best[name], rtol=0, atol=0)
