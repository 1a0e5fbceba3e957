"""Keras's own files of weights, and the callbacks that write them, with a wrapped optimizer that knows its model."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import lentando.tensorflow as lt

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of NumPy to Keras

X = np.linspace(-1, 1, 64, dtype=np.float32).reshape(16, 4)
Y = X.sum(1)


@pytest.fixture(autouse=True)
def _job() -> Iterator[None]:
    lt.init()
    yield
    lt.shutdown()


def make(base: Any, **options: Any) -> keras.Model:
    """A compiled model, which the optimizer knows."""
    keras.utils.set_random_seed(0)
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), keras.layers.Dense(1)])
    model.compile(lt.SlowMo(base, model=model, **{"period": 3, **options}), "mse", auto_scale_loss=False)
    return model


def fit(model: keras.Model, epochs: int = 1, callbacks: Any = ()) -> None:
    model.fit(X, Y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, callbacks=list(callbacks))


def state(model: keras.Model) -> list[Any]:
    return [*model.get_weights(), *(v.numpy() for v in model.optimizer.variables), int(model.optimizer.iterations)]


def assert_same(one: list[Any], other: list[Any]) -> None:
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_array_equal(mine, theirs)


BASES = {
    "sgd": lambda: keras.optimizers.SGD(0.05, momentum=0.5),
    "adam": lambda: keras.optimizers.Adam(0.05),
    "scaled": lambda: keras.optimizers.LossScaleOptimizer(keras.optimizers.SGD(0.05, momentum=0.5)),
}


@pytest.mark.slow
@pytest.mark.parametrize(("name", "base_buffers"), [("sgd", "maintain"), ("adam", "reset"), ("scaled", "maintain")])
def test_weights_are_loaded_with_the_base_optimizers_state(name: str, base_buffers: Any, tmp_path: Path) -> None:
    model = make(BASES[name](), base_buffers=base_buffers)
    fit(model)
    saved = state(model)
    model.save_weights(tmp_path / "model.weights.h5")
    fit(model)
    model.load_weights(tmp_path / "model.weights.h5")
    assert_same(state(model), saved)
    fresh = make(BASES[name](), base_buffers=base_buffers)
    fresh.load_weights(tmp_path / "model.weights.h5")
    assert_same(state(fresh), saved)
    fit(fresh)  # a graph is traced with what was loaded
    assert int(fresh.optimizer.iterations) == 8


@pytest.mark.slow
def test_backup_and_restore_continues_an_interrupted_fit(tmp_path: Path) -> None:
    class Interruption(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
            if epoch == 2:
                raise InterruptedError

    options = {
        "period": 1,
        "slow_momentum": 0.0,
        "base_buffers": "maintain",
    }  # the outer step keeps no state of its own
    expected = make(BASES["sgd"](), **options)
    fit(expected, epochs=4)
    backup = keras.callbacks.BackupAndRestore(tmp_path / "backup", delete_checkpoint=False)
    with pytest.raises(InterruptedError):
        fit(make(BASES["sgd"](), **options), epochs=4, callbacks=[backup, Interruption()])
    resumed = make(BASES["sgd"](), **options)
    fit(resumed, epochs=4, callbacks=[keras.callbacks.BackupAndRestore(tmp_path / "backup")])
    assert_same(state(resumed), state(expected))


@pytest.mark.slow
def test_model_checkpoint_of_weights_and_of_the_model(tmp_path: Path) -> None:
    model = make(BASES["adam"](), base_buffers="maintain")
    weights, whole = tmp_path / "best.weights.h5", tmp_path / "whole.keras"
    callbacks = [
        keras.callbacks.ModelCheckpoint(weights, save_weights_only=True),
        keras.callbacks.ModelCheckpoint(whole),
    ]
    fit(model, callbacks=callbacks)
    saved = state(model)
    loaded = keras.models.load_model(whole)
    assert isinstance(loaded.optimizer, keras.optimizers.Adam)
    assert_same(loaded.get_weights(), model.get_weights())
    loaded.compile(lt.SlowMo(loaded.optimizer, model=loaded, period=3, base_buffers="maintain"), "mse")
    assert_same(state(loaded), saved)
    again = make(BASES["adam"](), base_buffers="maintain")
    again.load_weights(weights)
    assert_same(state(again), saved)
