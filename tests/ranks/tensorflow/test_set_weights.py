"""Weights that the program sets between steps, in Keras: noticed in eager loops, in graphs and in fit."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import keras
import numpy as np
import pytest
import tensorflow as tf
from case_selection import selected_cases
from keras_training import GRAPHS
from numpy.testing import assert_allclose, assert_array_equal

import lentando.tensorflow as lt

PERIOD = 4
TRUE_WEIGHTS = np.array([[5.0], [-5.0], [3.0], [8.0]])


def data(seed: int | None = None, size: int = 64) -> tuple[Any, Any]:
    x = np.random.default_rng(lt.rank() if seed is None else seed).normal(size=(size, 4)).astype("f")
    return x, (x @ TRUE_WEIGHTS).astype("f")


def make(rate: float = 0.001, **settings: Any) -> tuple[Any, Any]:
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False)])
    settings = {"period": PERIOD, "slow_momentum": 0.9, **settings}
    optimizer = lt.SlowMo(keras.optimizers.SGD(rate), model=model, **settings)
    model.compile(optimizer=optimizer, loss="mse")
    return model, optimizer


def train(model: Any, optimizer: Any, steps: int, way: str) -> None:
    x, y = data(size=8 * steps)
    if way == "fit":
        model.fit(x, y, batch_size=8, shuffle=False, verbose=0)
        return

    def step(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean((model(x) - y) ** 2)
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables, loss=loss)

    take = GRAPHS.setdefault(optimizer, tf.function(step)) if way == "graph" else step
    for number in range(steps):
        take(tf.constant(x[8 * number : 8 * number + 8]), tf.constant(y[8 * number : 8 * number + 8]))


def warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name == "lentando" and r.levelno >= logging.WARNING]


def by_set_weights(model: Any, path: Any) -> None:
    model.set_weights([TRUE_WEIGHTS])


def by_assign(model: Any, path: Any) -> None:
    model.layers[0].kernel.assign(TRUE_WEIGHTS.astype("f"))


def by_load_weights(model: Any, path: Any) -> None:
    other = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1, use_bias=False)])
    other.set_weights([TRUE_WEIGHTS])
    file = str(path / f"{lt.rank()}.weights.h5")
    other.save_weights(file)
    keras.Sequential([keras.Input((4,)), model.layers[0]]).load_weights(file)  # next to the optimizer's state


WAYS = ["eager", "graph", "fit"]


MOMENTS = [(by_set_weights, PERIOD), (by_set_weights, PERIOD + 1), (by_assign, 2 * PERIOD)]


@pytest.mark.parametrize(
    ("set_weights", "taken", "way"),
    selected_cases(
        [(*MOMENTS[0], "fit"), (*MOMENTS[1], "eager"), (*MOMENTS[1], "graph"), (*MOMENTS[2], "fit")],
        [(*moment, way) for moment in MOMENTS for way in WAYS],
    ),
)
def test_weights_that_are_set_stay_and_it_is_reported_once(
    set_weights: Callable[..., None], taken: int, way: str, caplog: pytest.LogCaptureFixture, shared_path: Any
) -> None:
    model, optimizer = make()
    train(model, optimizer, taken, way)
    set_weights(model, shared_path)
    train(model, optimizer, 4 * PERIOD - taken, way)
    assert_allclose(model.get_weights()[0], TRUE_WEIGHTS, rtol=1e-5)
    found = warnings(caplog)
    assert len(found) == (lt.rank() == 0)
    assert all("the program has set weights on all ranks since the last outer step" in text for text in found)


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of NumPy to Keras
def test_weights_that_are_loaded_stay(caplog: pytest.LogCaptureFixture, shared_path: Any) -> None:
    model, optimizer = make()
    train(model, optimizer, PERIOD, "fit")
    by_load_weights(model, shared_path)
    train(model, optimizer, 2 * PERIOD, "fit")
    assert_allclose(model.get_weights()[0], TRUE_WEIGHTS, rtol=1e-5)
    assert len(warnings(caplog)) == (lt.rank() == 0)


def test_early_stopping_that_restores_weights_and_fit_again() -> None:
    model, optimizer = make(rate=0.05)
    x, y = data()
    model.fit(x, y, batch_size=8, epochs=3, verbose=0)
    optimizer.learning_rate = 10.0  # it diverges
    stopping = keras.callbacks.EarlyStopping(
        "loss",
        patience=1,  # check_words: allow
        restore_best_weights=True,
        start_from_epoch=0,
    )
    optimizer.learning_rate = 0.3
    model.fit(x, y, batch_size=8, epochs=2, verbose=0, callbacks=[stopping])
    optimizer.learning_rate = 0.0
    stopping.model.set_weights([TRUE_WEIGHTS])
    model.fit(x, y, batch_size=8, epochs=2, verbose=0)
    assert_allclose(model.get_weights()[0], TRUE_WEIGHTS, rtol=1e-5)


BASES = [lt.SGP(), lt.OSGP(staleness=2, deterministic=True), lt.AllReduce()]


@pytest.mark.parametrize(
    ("base", "way"),
    selected_cases(
        [*zip(BASES, ["graph", "eager", "graph"], strict=True)],
        [(base, way) for base in BASES for way in ("eager", "graph")],
    ),
    ids=repr,
)
def test_rollback_is_not_undone_by_any_base_algorithm(base: Any, way: str) -> None:
    model, optimizer = make(base=base)
    train(model, optimizer, PERIOD + 2, way)
    by_set_weights(model, None)
    train(model, optimizer, 3 * PERIOD, way)
    assert_allclose(model.get_weights()[0], TRUE_WEIGHTS, rtol=1e-4)


@pytest.mark.parametrize("way", WAYS)
def test_what_is_put_back_and_what_corrects_a_step_are_no_change(way: str, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make(rate=0.01)
    for number in range(2 * PERIOD):
        train(model, optimizer, 1, way)
        own = model.get_weights()
        model.set_weights([TRUE_WEIGHTS])
        model.set_weights(own)
        with optimizer.averaged():
            pass
        if number == 0:
            assert not optimizer._model.watch.found
    assert warnings(caplog) == []


def test_clipping_after_each_step_is_part_of_training(caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make(rate=0.01, period=6)
    kernel = model.layers[0].kernel
    kernel.assign(keras.ops.clip(kernel, -0.5, 0.5))
    train(model, optimizer, 1, "eager")
    kernel.assign(keras.ops.clip(kernel, -0.5, 0.5))
    optimizer.restart()  # of the first one nothing is known to compare it with
    for _ in range(20):
        train(model, optimizer, 1, "eager")
        kernel.assign(keras.ops.clip(kernel, -0.5, 0.5))
    assert abs(kernel.numpy()).max() <= 0.5
    assert warnings(caplog) == []


@pytest.mark.parametrize("way", selected_cases(["graph", "fit"], WAYS))
def test_constraints_checkpoints_and_evaluation_are_not_taken_for_it(
    way: str, caplog: pytest.LogCaptureFixture, shared_path: Any
) -> None:
    keras.utils.set_random_seed(lt.rank())
    layer = keras.layers.Dense(1, use_bias=False, kernel_constraint=keras.constraints.MaxNorm(0.5))
    model = keras.Sequential([keras.Input((4,)), layer])
    optimizer = lt.SlowMo(keras.optimizers.SGD(0.01), model=model, period=PERIOD)
    model.compile(optimizer=optimizer, loss="mse")
    model.set_weights([TRUE_WEIGHTS])
    lt.broadcast_variables(model.weights, 0)
    for _ in range(PERIOD + 1):
        train(model, optimizer, 1, way)
        with optimizer.averaged():
            model.evaluate(*data(), verbose=0)
        optimizer.report()
    lt.save(shared_path / "one", optimizer)
    train(model, optimizer, PERIOD, way)
    lt.load(shared_path / "one", optimizer)
    train(model, optimizer, 2 * PERIOD, way)
    assert not optimizer._model.watch.found
    assert warnings(caplog) == []


@pytest.mark.parametrize("way", selected_cases(["eager", "fit"], WAYS))
def test_restart_begins_with_these_weights_and_no_momentum(way: str, caplog: pytest.LogCaptureFixture) -> None:
    model, optimizer = make(rate=0.01)
    train(model, optimizer, PERIOD + 1, way)
    start = np.full((4, 1), 2.0, "f")
    model.set_weights([start])
    optimizer.restart(base_state="reset")
    assert_array_equal(model.get_weights()[0], start)
    other, fresh = make(rate=0.01)
    other.set_weights([start])
    train(model, optimizer, 2 * PERIOD, way)
    train(other, fresh, 2 * PERIOD, way)
    assert_allclose(model.get_weights()[0], other.get_weights()[0], rtol=1e-6)
    assert warnings(caplog) == []


def test_restart_refuses_to_reset_what_it_does_not_know() -> None:
    _, optimizer = make(base_buffers="maintain")
    with pytest.raises(lt.ConfigurationError, match="restart\\(base_state='reset'\\) needs the initial values"):
        optimizer.restart(base_state="reset")
    optimizer.restart()


def test_a_copy_of_a_variable_is_assigned_automatically() -> None:
    model, optimizer = make()
    variable = model.layers[0].kernel
    before = variable.numpy()
    twin = copy.deepcopy(variable)
    twin.assign(np.full((4, 1), 9.0, "f"))
    assert_array_equal(variable.numpy(), before)
    assert_array_equal(twin.numpy(), np.full((4, 1), 9.0))
    del optimizer
    model.compile(optimizer="sgd")
    variable.assign_add(np.ones((4, 1), "f"))
    assert_allclose(variable.numpy(), before + 1)


# --- inside averaged() ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("base", "way", "traced_before"),
    [
        (lt.LocalSGD(), "eager", True),
        (lt.LocalSGD(), "graph", False),
        (lt.AllReduce(), "graph", True),
        (lt.SGP(), "fit", False),
        *selected_cases([], [(lt.LocalSGD(), "fit", True), (lt.SGP(), "graph", True)]),
    ],
)
def test_a_step_inside_averaged_is_an_error_and_changes_nothing(base: Any, way: str, traced_before: bool) -> None:
    results = []
    for tries in (False, True):
        model, optimizer = make(rate=0.01, base=base)
        x, y = data()

        def step(x: Any, y: Any, model: Any = model, optimizer: Any = optimizer) -> None:
            with tf.GradientTape() as tape:
                loss = tf.reduce_mean((model(x) - y) ** 2)
            optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

        step_once = tf.function(step) if way == "graph" else step

        def take(steps: int, model: Any = model, x: Any = x, y: Any = y, step_once: Any = step_once) -> None:
            if way == "fit":
                model.fit(x, y, batch_size=64, epochs=steps, verbose=0)
                return
            for _ in range(steps):
                step_once(x, y)

        if traced_before:
            take(2)
        with optimizer.averaged():
            average = model.get_weights()[0]
            if tries:
                with pytest.raises(Exception, match="a step is not possible inside averaged\\(\\)"):
                    take(1)
                assert_array_equal(model.get_weights()[0], average)
        take(PERIOD + 1)
        results.append((model.get_weights()[0], optimizer.report()["inner_steps"]))
    assert_array_equal(results[0][0], results[1][0])
    assert results[0][1] == results[1][1]


def test_a_checkpoint_inside_averaged_is_an_error(shared_path: Any) -> None:
    model, optimizer = make()
    train(model, optimizer, 1, "fit")
    lt.save(shared_path / "one", optimizer)
    with optimizer.averaged():
        with pytest.raises(lt.ConfigurationError, match="to save a checkpoint is not possible inside averaged"):
            lt.save(shared_path / "two", optimizer)
        with pytest.raises(lt.ConfigurationError, match="to load a checkpoint is not possible inside averaged"):
            lt.load(shared_path / "one", optimizer)
    assert not (shared_path / "two").exists()


# --- values that are not finite at the end -------------------------------------------------------------------------


def test_fit_that_ends_with_weights_that_are_not_finite_says_so() -> None:
    """On this rank alone: the others may still train."""
    model, optimizer = make(period=100)
    x, y = data()
    model.fit(x, y, batch_size=8, verbose=0)
    if lt.rank() == lt.size() - 1:
        with pytest.raises(lt.NonFiniteError, match=f"fit has ended on rank {lt.rank()} with .*kernel' not finite"):
            model.fit(x, y * np.nan, batch_size=8, verbose=0)
    else:
        model.fit(x, y, batch_size=8, verbose=0)
    with pytest.raises(lt.NonFiniteError, match="evaluation of the average"), optimizer.averaged():
        pass
