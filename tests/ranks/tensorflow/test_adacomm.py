"""AdaComm with Keras on several ranks: every rank sees another loss, and all decide alike, from a graph too."""

from typing import Any

import keras
import numpy as np
import pytest
import reference
import tensorflow as tf
from case_selection import selected_cases
from keras_training import Vector

import lentando.tensorflow as lt

LOSSES = [2.3, 1.15, 0.575, 0.56, 0.55, 0.2, 0.05]
PERIODS = {True: [20, 15, 10, 5, 2, 1, 1], False: [20, 15, 10, 10, 10, 6, 3]}


def adacomm(model: Any = None, **options: Any) -> lt.DistributedOptimizer:
    sgd = keras.optimizers.SGD(0.0625, momentum=0.5)
    return lt.AdaComm(sgd, model=model, **{"initial_period": 20, "interval_steps": 1, **options})


def everyones_periods(optimizer: lt.DistributedOptimizer) -> list[int]:
    decisions = optimizer.report()["decisions"]
    assert all(other == decisions for other in lt.allgather_object(decisions))
    return [decision["period"] for decision in decisions]


@pytest.mark.parametrize(
    ("graph", "refined"),
    selected_cases(
        [(False, False), (True, True)], [(graph, refined) for graph in (False, True) for refined in (True, False)]
    ),
)
def test_papers_periods_from_losses_that_only_agree_in_the_mean(graph: bool, refined: bool) -> None:
    """O30, O31, O35."""
    vector = Vector(np.ones(6), adacomm(refined=refined), graph)
    own = 50.0 * (lt.rank() - (lt.size() - 1) / 2)
    ends = np.cumsum([20, *PERIODS[refined]])  # the first round gives the first loss, and decides nothing
    for step in range(ends[-1]):
        vector.step(vector.value, LOSSES[min(int((step >= ends[:-1]).sum()), 6)] + own)
    assert [20, *everyones_periods(vector.optimizer)][: len(LOSSES)] == PERIODS[refined]


def test_periods_fall_in_fit_which_gives_the_loss_automatically() -> None:
    keras.utils.set_random_seed(1)
    model = keras.Sequential([keras.layers.Input((4,)), keras.layers.Dense(8, "tanh"), keras.layers.Dense(1)])
    optimizer = adacomm(model, initial_period=8, interval_steps=12, slow_momentum=0.3)
    model.compile(optimizer=optimizer, loss="mse")
    inputs = np.random.default_rng(lt.rank()).normal(size=(6 * 72, 4)).astype(np.float32)
    model.fit(inputs, (1 + lt.rank()) * inputs.sum(1, keepdims=True), batch_size=6, verbose=0)
    periods = everyones_periods(optimizer)
    assert periods == sorted(periods, reverse=True)
    assert periods[-1] < 8


@pytest.mark.parametrize("graph", [False, True])
def test_periods_follow_the_mean_validation_loss_of_all_ranks(graph: bool) -> None:
    optimizer = adacomm(initial_period=16, by_validation_loss=True)
    vector = Vector(np.ones(6), optimizer, graph)
    losses = np.array([[4.0, 2.0], [3.0, np.nan], [np.nan, np.nan], [2.0, 0.5], [2.0, 0.5], [0.1, 0.1]])
    losses = np.stack([losses[:, rank % 2] for rank in range(lt.size())], axis=1)
    steps = 0
    for own in losses[:, lt.rank()]:
        period = 16 if steps == 0 else optimizer.period
        for step in range(period):
            if step == 1 % period and steps and not np.isnan(own):
                optimizer.schedule.record_validation_loss(own)
            vector.step(vector.value)
            steps += 1
            if steps == 1:  # Keras's optimizers are built by their first step
                optimizer.schedule.record_validation_loss(own)
    expected = reference.adacomm_by_validation(losses, 16)
    assert [16, *everyones_periods(optimizer)] == expected
    assert optimizer.period == expected[-1]


@pytest.mark.parametrize("graph", [False, True])
def test_step_without_its_loss_is_refused_at_once(graph: bool) -> None:
    variable = keras.Variable([1.0, 2.0])
    optimizer = adacomm()

    def step() -> None:
        optimizer.apply([tf.ones(2)], [variable])

    if graph:
        # AutoGraph raises an error of its own class with our text.
        with pytest.raises(Exception, match="ConfigurationError.* depends on the training loss"):
            tf.function(step)()
    else:
        with pytest.raises(lt.ConfigurationError, match="came without its training loss"):
            step()
