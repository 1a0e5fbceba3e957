"""Outer steps of a kind of its own: one file of the user, and no change of the replica."""

from typing import Any

import numpy as np
import pytest
from numpy.testing import assert_allclose
from own_outer_steps import EightBitAverage, OverlapLocalSGD
from torch_training import QUADRATIC, START, set_gradient, sgd, train_vector, vector

import lentando.torch as lt

RATE, PERIOD, STEPS = 0.05, 3, 13


def wrapped(model: Any, outer: Any, **settings: Any) -> lt.DistributedOptimizer:
    base = settings.pop("base", lt.LocalSGD())
    return lt.DistributedOptimizer(
        sgd(model, momentum=0), model=model, base=base, outer=outer, period=PERIOD, **settings
    )


def local_steps(x: Any, step: int) -> Any:
    return x - RATE * np.array([QUADRATIC(rank, step, own) for rank, own in enumerate(x)])


def overlapped_reference(steps: int, pullback: float) -> Any:
    x = np.tile(START, (lt.size(), 1))
    average = START
    for step in range(steps):
        x = local_steps(x, step)
        if (step + 1) % PERIOD == 0:
            x = x + pullback * (average - x)
            average = x.mean(axis=0)
    return x


def eight_bit_reference(counts: list[int]) -> Any:
    x = np.tile(START, (lt.size(), 1))
    for first in range(0, max(counts), PERIOD):
        anchor, active = x[0].copy(), [count > first for count in counts]
        for step in range(first, first + PERIOD):
            taken = local_steps(x, step)
            x = np.array([taken[rank] if step < counts[rank] else x[rank] for rank in range(lt.size())])
        change = x - anchor
        scale = np.maximum(np.abs(change).max(axis=1, keepdims=True), 1e-30) / 127
        mean = (np.rint(change / scale) * scale)[active].mean(axis=0)
        x = np.tile(anchor + mean, (lt.size(), 1))
    return x


def test_an_average_that_overlaps_with_the_next_round() -> None:
    model = vector()
    found = train_vector(wrapped(model, OverlapLocalSGD(0.25)), model, STEPS)
    assert_allclose(found, overlapped_reference(STEPS, 0.25)[lt.rank()], rtol=0, atol=1e-13)


def test_it_continues_from_its_saved_state() -> None:
    model = vector()
    optimizer = wrapped(model, OverlapLocalSGD())
    train_vector(optimizer, model, PERIOD)
    saved, weights = optimizer.state_dict(), {name: t.clone() for name, t in model.state_dict().items()}
    whole = train_vector(optimizer, model, 2 * PERIOD).copy()

    model = vector()
    optimizer = wrapped(model, OverlapLocalSGD())
    model.load_state_dict(weights)
    optimizer.load_state_dict(saved)
    assert (train_vector(optimizer, model, 2 * PERIOD) == whole).all()


def test_gossip_continues_from_what_it_leaves_on_each_rank() -> None:
    model = vector()
    optimizer = wrapped(model, OverlapLocalSGD(0.5), base=lt.SGP(lt.Ring()))
    for step in range(STEPS):
        set_gradient(model, step)
        optimizer.step()
    with optimizer.averaged():  # the exact average has arrived in any case
        mean = model.weight.detach().numpy()[0].copy()
    everyones = np.array(lt.allgather_object(model.weight.detach().numpy()[0].tolist()))
    weights = np.array(lt.allgather_object(float(optimizer._replica.base.steps.weight)))  # type: ignore[attr-defined]
    assert_allclose(weights.sum(), lt.size(), rtol=1e-12)
    assert_allclose(mean, (weights[:, None] * everyones).mean(axis=0), rtol=0, atol=1e-12)


def test_an_average_in_eight_bits() -> None:
    model = vector()
    found = train_vector(wrapped(model, EightBitAverage()), model, 4 * PERIOD)
    assert_allclose(found, eight_bit_reference([4 * PERIOD] * lt.size())[lt.rank()], rtol=0, atol=1e-13)


def test_it_may_support_uneven_data() -> None:
    model, counts = vector(), [PERIOD * (1 + rank % 2) for rank in range(lt.size())]
    optimizer = wrapped(model, EightBitAverage())
    with lt.join(optimizer):
        train_vector(optimizer, model, counts[lt.rank()])
    found = model.weight.detach().numpy()[0]
    assert_allclose(found, eight_bit_reference(counts)[lt.rank()], rtol=0, atol=1e-13)


def test_what_it_does_not_support_is_refused_on_every_rank() -> None:
    model = vector()
    optimizer = wrapped(model, OverlapLocalSGD())
    with pytest.raises(lt.ConfigurationError, match=r"join is not possible with the outer step OverlapLocalSGD"):
        lt.join(optimizer).__enter__()
    with pytest.raises(lt.ConfigurationError, match=r"OverlapLocalSGD.* is not possible with on_nonfinite='skip'"):
        wrapped(vector(), OverlapLocalSGD(), on_nonfinite="skip")


def test_its_settings_are_compared_between_ranks() -> None:
    if lt.size() > 1:
        with pytest.raises(lt.MismatchError, match=r"the settings differ between ranks.*pullback"):
            wrapped(vector(), OverlapLocalSGD(0.5 + lt.rank() / 4))


def test_restart_begins_from_the_average() -> None:
    model = vector()
    optimizer = wrapped(model, OverlapLocalSGD())
    train_vector(optimizer, model, PERIOD)
    own = np.array(lt.allgather_object(model.weight.detach().numpy()[0].tolist()))
    optimizer.restart()
    assert_allclose(model.weight.detach().numpy()[0], own.mean(axis=0), rtol=0, atol=1e-14)
