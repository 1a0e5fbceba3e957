"""Outer steps and gradients in few bits, weights, and one bad rank, in PyTorch."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from numpy.testing import assert_allclose
from quantized_reference import QuantizedRounds, quantized
from torch_training import net, sgd, train

import lentando.torch as lt

DIMENSION, RATE, PERIOD = 700, 0.125, 3
START = np.linspace(-1, 1, DIMENSION)
QUADRATIC = reference.quadratic(DIMENSION)
LEVELS = {"int8": 127, "int4": 7}


def vector() -> torch.nn.Linear:
    model = torch.nn.Linear(DIMENSION, 1, bias=False).double()
    with torch.no_grad():
        model.weight.copy_(torch.from_numpy(START)[None])
    return model


def trained(optimizer: lt.DistributedOptimizer, model: torch.nn.Linear, steps: int, faster: float = 1.0) -> Any:
    for step in range(steps):
        x = model.weight.detach().numpy()[0]
        model.weight.grad = torch.from_numpy(faster * QUADRATIC(lt.rank(), step, x))[None]
        optimizer.step(samples=1 + lt.rank())
    return model.weight.detach().numpy()[0]


def expected(rounds: QuantizedRounds, steps: int, factors: Any = None, rule: Any = lambda _, mean: mean) -> Any:
    x = [START] * lt.size()
    for step in range(steps):
        x = [own - RATE * QUADRATIC(rank, step, own) for rank, own in enumerate(x)]
        if (step + 1) % PERIOD == 0:
            x = [rounds.end(x, factors, rule)] * lt.size()
    return x[lt.rank()]


@pytest.mark.parametrize("name", LEVELS)
def test_slowmo_equals_an_independent_reference(name: Any) -> None:
    def rule(rounds: QuantizedRounds, mean: Any) -> Any:
        rounds.u = 0.5 * rounds.u + (rounds.anchor - mean) / RATE
        return rounds.anchor - RATE * rounds.u

    model = vector()
    optimizer = lt.SlowMo(sgd(model, lr=RATE, momentum=0), period=PERIOD, slow_momentum=0.5, wire_dtype=name)
    found = trained(optimizer, model, 4 * PERIOD + 1)
    rounds = QuantizedRounds(START, lt.size(), lambda v: quantized(v, LEVELS[name]))
    assert_allclose(found, expected(rounds, 4 * PERIOD + 1, rule=rule), rtol=0, atol=1e-12)


def test_samples_weight_the_ranks() -> None:
    model = vector()
    optimizer = lt.SlowMo(sgd(model, lr=RATE, momentum=0), period=PERIOD, slow_momentum=0, weighting="samples")
    found = trained(optimizer, model, 2 * PERIOD)
    factors = [2 * (1 + rank) / (1 + lt.size()) for rank in range(lt.size())]
    rounds = QuantizedRounds(START, lt.size(), np.copy)
    assert_allclose(found, expected(rounds, 2 * PERIOD, factors), rtol=0, atol=1e-12)


def test_missing_samples_are_an_error_on_every_rank() -> None:
    model = vector()
    optimizer = lt.SlowMo(sgd(model, lr=RATE), period=1, weighting="samples")
    model.weight.grad = torch.zeros(1, DIMENSION, dtype=torch.float64)
    with pytest.raises(lt.ConfigurationError, match=r"weighting='samples' needs the number of samples of every step"):
        optimizer.step(samples=1 if lt.rank() and lt.size() > 1 else None)


@pytest.mark.parametrize("name", LEVELS)
def test_replicas_of_a_network_are_bit_identical_and_resume_exactly(name: Any, shared_path: Path) -> None:
    """With BatchNorm, several parameter groups, weights and a penalty, from a checkpoint in the middle of a round."""

    def wrapped(model: torch.nn.Module) -> Any:
        groups = [{"params": list(model.conv.parameters())}, {"params": list(model.out.parameters()), "lr": 0.02}]
        penalty = lt.MovementPenalty(clip_norm=10.0, outlier_threshold=50.0)
        return lt.SlowMo(
            torch.optim.SGD(groups, lr=0.05, momentum=0.9),
            model=model,
            period=PERIOD,
            wire_dtype=name,
            movement_penalty=penalty,
        )

    model = net()
    optimizer = wrapped(model)
    train(optimizer, model, PERIOD)
    state = {name: t.tolist() for name, t in model.state_dict().items()}
    assert all(other == state for other in lt.allgather_object(state))
    train(optimizer, model, PERIOD + 1, first=PERIOD)
    lt.save(shared_path, optimizer)
    train(optimizer, model, PERIOD, first=2 * PERIOD + 1)
    whole = {name: t.clone() for name, t in model.state_dict().items()}

    model = net(seed=1)
    optimizer = wrapped(model)
    lt.load(shared_path, optimizer)
    train(optimizer, model, PERIOD, first=2 * PERIOD + 1)
    assert all(torch.equal(whole[name], t) for name, t in model.state_dict().items())


@pytest.mark.parametrize("name", LEVELS)
def test_gradients_are_the_same_on_all_ranks_and_close_to_the_mean(name: Any) -> None:
    model = vector()
    optimizer = lt.DistributedOptimizer(sgd(model, lr=RATE, momentum=0), base=lt.AllReduce(wire_dtype=name))
    found = trained(optimizer, model, 20)
    assert all(other == found.tolist() for other in lt.allgather_object(found.tolist()))
    x = START
    for step in range(20):
        x = x - RATE * np.mean([QUADRATIC(rank, step, x) for rank in range(lt.size())], axis=0)
    assert_allclose(found, x, rtol=0, atol=4 * RATE / LEVELS[name])


PENALTIES = [
    lt.MovementPenalty(clip_norm=1.0),
    lt.MovementPenalty(norm_weights="inverse"),
    lt.MovementPenalty(norm_weights="softmax"),
]


@pytest.mark.parametrize("penalty", PENALTIES, ids=["clip", "inverse", "softmax"])
@pytest.mark.parametrize("name", [None, "int8"])
def test_one_rank_with_a_100_times_learning_rate_does_not_spoil_the_average(penalty: Any, name: Any) -> None:
    """The distance from the optimum of the others ends below where it began; without a penalty it explodes."""
    if lt.size() < 3:
        pytest.skip("one bad rank of two is half of them")
    bad = lt.rank() == 1
    optimum = np.zeros(DIMENSION)
    distances = []
    for own in (penalty, None):
        model = vector()
        faster = sgd(model, lr=RATE * (100 if bad else 1), momentum=0)
        optimizer = lt.SlowMo(
            faster, period=PERIOD, slow_momentum=0, movement_penalty=own, wire_dtype=name, rates_may_differ=True
        )
        try:
            found = trained(optimizer, model, 10 * PERIOD)
            distances.append(float(np.abs(found - optimum).max()))
        except lt.NonFiniteError:
            distances.append(float("inf"))
    assert distances[0] < 20
    assert distances[1] > 1e6


@pytest.mark.parametrize("penalty", [*PENALTIES, lt.MovementPenalty(outlier_threshold=3.0)], ids=repr)
@pytest.mark.parametrize("name", [None, "int8"])
def test_skipping_a_rank_with_nan_is_the_average_of_the_others(penalty: Any, name: Any) -> None:
    """One rank has NaN at the end of the second round: all ranks continue from where the others have moved."""
    if lt.size() < 3:
        pytest.skip("the average of several others is wanted")
    model = vector()
    settings = {"slow_momentum": 0, "movement_penalty": penalty, "wire_dtype": name, "on_nonfinite": "skip"}
    optimizer = lt.SlowMo(sgd(model, lr=RATE, momentum=0), period=PERIOD, **settings)
    trained(optimizer, model, 2 * PERIOD - 1)
    if lt.rank() == 1:
        with torch.no_grad():
            model.weight[0, 0] = float("nan")
    found = trained(optimizer, model, 1)
    assert np.isfinite(found).all()
    assert all(other == found.tolist() for other in lt.allgather_object(found.tolist()))
    assert optimizer.report()["left_out"] == (lt.rank() == 1)
    assert np.abs(trained(optimizer, model, 6 * PERIOD)).max() < 5


def test_an_outlier_is_left_out() -> None:
    """A rank whose steps become 100 times longer after 5 rounds: the others continue as if it were not there."""
    if lt.size() < 3:
        pytest.skip("one bad rank of two is half of them")
    model = vector()
    base = sgd(model, lr=RATE, momentum=0)
    penalty = lt.MovementPenalty(outlier_threshold=5.0, warmup_rounds=4)
    optimizer = lt.SlowMo(base, period=PERIOD, slow_momentum=0, movement_penalty=penalty, rates_may_differ=True)
    trained(optimizer, model, 5 * PERIOD)
    if lt.rank() == 1:
        base.param_groups[0]["lr"] *= 100
    found = trained(optimizer, model, 5 * PERIOD)
    assert np.abs(found).max() < 5
    assert optimizer.report()["outlier_rounds"] == (5 if lt.rank() == 1 else 0)
