"""Validation, early stopping and checkpoints of ``fit`` judge the average of all replicas."""

from pathlib import Path
from typing import Any

import keras
import keras_training  # noqa: F401 - quiets TensorFlow
import numpy as np
import pytest

import lentando.tensorflow as lt

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of NumPy to Keras

VALIDATION = np.random.default_rng(9).normal(size=(16, 3)).astype("float32")


def data() -> Any:
    x = np.random.default_rng(lt.rank()).normal(size=(20, 3)).astype("float32")
    return x, x.sum(1) + lt.rank()


def make(**options: Any) -> keras.Model:
    """Replicas that are apart at the end of an epoch of five steps."""
    keras.utils.set_random_seed(0)
    layers = [keras.layers.BatchNormalization(), keras.layers.Dense(1)]
    model = keras.Sequential([keras.Input((3,)), *layers])
    base = keras.optimizers.SGD(0.05, momentum=0.5, **options)
    optimizer = lt.SlowMo(base, model=model, period=7, base_buffers="maintain")
    model.compile(optimizer, "mse", jit_compile=False)
    return model


def fit(model: keras.Model, callbacks: Any, epochs: int = 3, validate: bool = True) -> Any:
    x, y = data()
    validation = (VALIDATION, VALIDATION.sum(1)) if validate else None
    return model.fit(
        x, y, batch_size=4, epochs=epochs, shuffle=False, verbose=0, validation_data=validation, callbacks=callbacks
    ).history


class Recorder(keras.callbacks.Callback):  # type: ignore[misc]
    """Keeps the weights that callbacks see at the end of epochs."""

    def __init__(self) -> None:
        super().__init__()
        self.weights: list[Any] = []

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.weights.append(self.model.get_weights())


def assert_same(one: Any, other: Any, **tolerances: float) -> None:
    for mine, theirs in zip(one, other, strict=True):
        np.testing.assert_allclose(mine, theirs, **{"rtol": 0, **tolerances})


def means(weights: Any) -> list[Any]:
    by_rank = lt.allgather_object(weights)
    return [np.mean([rank[number] for rank in by_rank], 0) for number in range(len(weights))]


@pytest.fixture(scope="module")
def alone() -> Any:
    """Weights at the end, and those that callbacks have seen, without averages and without validation."""
    model, plain = make(), Recorder()
    fit(model, [plain], validate=False)
    return model.get_weights(), plain.weights


@pytest.mark.parametrize("validate", [True, False])
def test_callbacks_see_the_average_and_training_is_not_changed(validate: bool, alone: Any) -> None:
    at_end, plain = alone
    model, recorder = make(), Recorder()
    history = fit(model, [lt.AveragedModelCallback(), recorder], validate=validate)
    assert_same(model.get_weights(), at_end)
    for seen, own in zip(recorder.weights, plain, strict=True):
        assert_same(seen, means(own), rtol=1e-5, atol=1e-6)
        assert_same(seen, lt.allgather_object(seen)[0])
    if validate:
        model.set_weights(recorder.weights[-1])
        expected = model.evaluate(VALIDATION, VALIDATION.sum(1), verbose=0)
        np.testing.assert_allclose(history["val_loss"][-1], expected, rtol=1e-5)
        assert history["val_loss"] == lt.allgather_object(history["val_loss"])[0]
    assert history["loss"] == lt.allgather_object(history["loss"])[0]


def test_early_stopping_and_checkpoint_keep_the_best_average(tmp_path: Path) -> None:
    model, recorder, path = make(), Recorder(), tmp_path / "best.weights.h5"
    callbacks = [
        lt.AveragedModelCallback(),
        recorder,
        keras.callbacks.ModelCheckpoint(path, save_best_only=True, save_weights_only=True, mode="max"),
        keras.callbacks.EarlyStopping(patience=2, restore_best_weights=True, mode="max"),  # check_words: allow
    ]
    history = fit(model, callbacks, epochs=12)
    best = int(np.argmax(history["val_loss"]))  # an early one, as training lowers it
    assert len(history["val_loss"]) == best + 3
    assert_same(model.get_weights(), recorder.weights[best])
    assert_same(model.get_weights(), lt.allgather_object(model.get_weights())[0])
    saved = make()
    saved.load_weights(path)
    assert_same(saved.get_weights(), recorder.weights[best])


def test_evaluate_of_the_average_and_training_after_an_interruption() -> None:
    model = make()
    fit(model, [])
    own = model.get_weights()
    averaged = lt.AveragedModelCallback()
    found = model.evaluate(VALIDATION, VALIDATION.sum(1), verbose=0, callbacks=[averaged])
    assert_same(model.get_weights(), own)
    with model.optimizer.averaged():
        expected = model.evaluate(VALIDATION, VALIDATION.sum(1), verbose=0)
    assert found == expected

    class Interruption(keras.callbacks.Callback):  # type: ignore[misc]
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            raise InterruptedError

    with pytest.raises(InterruptedError):
        fit(model, [averaged, Interruption()])
    fit(model, [averaged], epochs=1)


def test_moving_average_of_the_weights_is_kept_at_the_end() -> None:
    options: dict[str, Any] = {"use_ema": True, "ema_momentum": 0.5}
    model, plain = make(**options), make(**options)
    fit(model, [lt.AveragedModelCallback()], validate=False)
    fit(plain, [], validate=False)
    assert_same(model.get_weights(), plain.get_weights())
