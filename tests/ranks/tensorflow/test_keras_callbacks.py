"""Horovod's Keras callbacks, step by step against formulas in NumPy."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

import lentando.keras as hvd_keras
import lentando.tensorflow as lt
import lentando.tensorflow.keras as hvd

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of NumPy to Keras

RATE, MOMENTUM, BATCHES = 0.25, 0.5, 4
callbacks = hvd.callbacks


class Recorder(keras.callbacks.Callback):
    """Records the learning rate and the weights after each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.rates: list[float] = []
        self.weights: list[float] = []

    def on_train_batch_end(self, batch: int, logs: Any = None) -> None:
        self.rates.append(float(self.model.optimizer.learning_rate))
        self.weights.append(float(self.model.weights[0][0, 0]))


def fit(*given: Any, epochs: int, wrapped: bool = True, nesterov: bool = False, **options: Any) -> Recorder:
    """A model of one weight, whose gradient is 1 in each step."""
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    sgd = keras.optimizers.SGD(RATE, momentum=MOMENTUM, nesterov=nesterov)
    model.compile(hvd.DistributedOptimizer(sgd) if wrapped else sgd, lambda y, output: output)
    recorder = Recorder()
    ones = np.ones([BATCHES, 1])
    recorder.history = model.fit(
        ones, ones, batch_size=1, epochs=epochs, verbose=0, callbacks=[*given, recorder], **options
    )
    return recorder


def expected_weights(rates: list[float], correct: bool = True, nesterov: bool = False) -> list[float]:
    """SGD with the sum of gradients as momentum (with correction), or with the sum of steps (without)."""
    weight, gradients, steps, found = 0.0, 0.0, 0.0, []
    for rate in rates:
        if correct:
            gradients = MOMENTUM * gradients + 1
            weight -= rate * (MOMENTUM * gradients + 1 if nesterov else gradients)
        else:
            steps = MOMENTUM * steps + rate
            weight -= steps
        found.append(weight)
    return found


def by_batch(epochs: int, rate: Callable[[int, int], float]) -> list[float]:
    return [rate(epoch, batch) for epoch in range(epochs) for batch in range(BATCHES)]


@pytest.mark.parametrize(("wrapped", "nesterov"), [(True, False), (False, True)])
def test_warm_up_raises_the_rate_at_every_batch(
    wrapped: bool, nesterov: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    size = lt.size()
    warm_up = callbacks.LearningRateWarmupCallback(RATE, warmup_epochs=2, verbose=1)
    recorder = fit(warm_up, epochs=3, wrapped=wrapped, nesterov=nesterov)

    def rate(epoch: int, batch: int) -> float:
        position = min(epoch + (batch + 1) / BATCHES, 2)
        return RATE / size * (position * (size - 1) / 2 + 1)

    rates = by_batch(3, rate)
    assert rates[7:] == [RATE] * 5
    np.testing.assert_allclose(recorder.rates, rates, rtol=1e-6)
    np.testing.assert_allclose(recorder.weights, expected_weights(rates, nesterov=nesterov), rtol=1e-5)
    np.testing.assert_allclose(recorder.history.history["lr"], rates[3::4], rtol=1e-6)
    printed = "Epoch 2: the warm-up ends with a learning rate of 0.25" in capsys.readouterr().out
    assert printed == (lt.rank() == 0)


@pytest.mark.parametrize("correct", [True, False])
def test_schedules_follow_each_other_by_epoch(correct: bool) -> None:
    options = {"momentum_correction": correct}
    recorder = fit(
        callbacks.LearningRateScheduleCallback(RATE, 0.5, start_epoch=1, end_epoch=4, **options),
        callbacks.LearningRateScheduleCallback(RATE, lambda epoch: epoch, start_epoch=4, **options),
        epochs=6,
    )
    factors = [1, 1, 0.5, 0.25, 4, 5]
    rates = by_batch(6, lambda epoch, batch: RATE * factors[epoch])
    assert recorder.rates == rates
    np.testing.assert_allclose(recorder.weights, expected_weights(rates, correct), rtol=1e-6)


def test_schedule_by_batch_uses_the_given_number_of_batches() -> None:
    schedule = callbacks.LearningRateScheduleCallback(RATE, lambda epoch: 1 + epoch, staircase=False, steps_per_epoch=8)
    recorder = fit(schedule, epochs=2)
    assert recorder.rates == by_batch(2, lambda epoch, batch: RATE * (1 + epoch + batch / 8))


def test_rate_of_0_ends_the_momentum() -> None:
    schedule = callbacks.LearningRateScheduleCallback(RATE, lambda epoch: epoch % 2)
    recorder = fit(schedule, epochs=3)
    assert recorder.rates == by_batch(3, lambda epoch, batch: RATE * (epoch % 2))
    np.testing.assert_allclose(recorder.weights[:8], [0.0] * 4 + expected_weights([RATE] * 4), rtol=1e-6)
    assert recorder.weights[8:] == [recorder.weights[7]] * 4


def test_what_cannot_be_scheduled_is_refused() -> None:
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    decay = keras.optimizers.schedules.ExponentialDecay(0.1, 10, 0.9)
    model.compile(keras.optimizers.SGD(decay), "mse")
    with pytest.raises(lt.ConfigurationError, match="cannot set the learning rate of an optimizer that has a schedule"):
        model.fit(np.ones([2, 1]), np.ones([2]), verbose=0, callbacks=[callbacks.LearningRateWarmupCallback(0.1)])
    callback = callbacks.LearningRateWarmupCallback(0.1)
    model.compile(keras.optimizers.SGD(0.1), "mse")
    callback.set_model(model)
    callback.set_params({"epochs": 1, "steps": None})
    with pytest.raises(lt.ConfigurationError, match="pass steps_per_epoch= to LearningRateWarmupCallback"):
        callback.on_train_begin()
    with pytest.raises(ValueError, match="initial_lr is needed"):
        callbacks.LearningRateScheduleCallback(None, 0.1)  # type: ignore[arg-type]


def test_broadcast_leaves_local_variables_and_continues_at_the_count_of_the_root() -> None:
    rank, root = lt.rank(), lt.size() - 1
    constant = keras.initializers.Constant(float(rank))
    layers = [keras.layers.Dense(2, kernel_initializer=constant, bias_initializer=constant) for _ in range(3)]
    model = keras.Sequential([keras.Input([2]), *layers])
    optimizer = keras.optimizers.SGD(0.0, momentum=0.5)
    optimizer.build(model.trainable_variables)
    optimizer.iterations.assign(10 * rank)
    model.compile(optimizer, "mse")
    broadcast = callbacks.BroadcastGlobalVariablesCallback(root, local_variables=layers[0].variables)
    model.fit(np.ones([2, 2]), np.ones([2, 2]), batch_size=1, verbose=0, callbacks=[broadcast])
    assert {value for array in layers[0].get_weights() for value in array.flat} == {rank}
    assert {value for layer in layers[1:] for array in layer.get_weights() for value in array.flat} == {root}
    assert int(optimizer.iterations) == 10 * root + 2
    callbacks.BroadcastGlobalVariablesCallback(0, "", layers[0].kernel)
    with pytest.raises(lt.ConfigurationError, match="must be variables of the model, got str"):
        callbacks.BroadcastGlobalVariablesCallback(0, local_variables=["kernel"])


def test_broadcast_in_one_fit_only_so_that_a_second_one_continues_in_the_middle_of_a_round() -> None:
    """After the outer steps at 2 and 4, each rank has taken a step of its own, which the second fit leaves alone."""
    rank, size = lt.rank(), lt.size()
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    optimizer = lt.SlowMo(keras.optimizers.SGD(RATE), model=model, period=2, slow_momentum=0.0)
    model.compile(optimizer, lambda y, output: output)
    x = np.full([BATCHES + 1, 1], 1.0 + rank)  # which is the gradient of each step
    broadcast = callbacks.BroadcastGlobalVariablesCallback(0)
    first, second = Recorder(), Recorder()
    for recorder in (first, second):
        model.fit(x, x, batch_size=1, shuffle=False, verbose=0, callbacks=[broadcast, recorder])
    mean = (size + 1) / 2
    ends = [-BATCHES * RATE * mean, -(2 * BATCHES + 2) * RATE * mean]
    np.testing.assert_allclose(first.weights[-2:], [ends[0], ends[0] - RATE * (1 + rank)], rtol=1e-6)
    np.testing.assert_allclose(second.weights[-1], ends[1], rtol=1e-6)


def test_callbacks_can_be_called_by_a_loop_around_train_on_batch() -> None:
    rank, size = lt.rank(), lt.size()
    constant = keras.initializers.Constant(float(rank))
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, kernel_initializer=constant)])
    optimizer = keras.optimizers.SGD(0.0)
    model.compile(optimizer, "mse")
    broadcast = callbacks.BroadcastGlobalVariablesCallback(size - 1)
    warm_up = callbacks.LearningRateWarmupCallback(RATE, warmup_epochs=1, steps_per_epoch=BATCHES)
    for callback in (broadcast, warm_up):
        callback.set_model(model)
    warm_up.on_train_begin()
    warm_up.on_epoch_begin(0)
    warm_up.on_batch_begin(1)
    broadcast.on_batch_end(0)
    assert model.layers[0].get_weights()[0] == [[size - 1.0]]
    np.testing.assert_allclose(float(optimizer.learning_rate), RATE / size * (2 / BATCHES * (size - 1) + 1), rtol=1e-6)
    wrapped = hvd.DistributedOptimizer(keras.optimizers.SGD(0.1, momentum=0.5))
    wrapped.build(model.trainable_variables)
    assert [id(variable) for variable in wrapped.variables()] == [id(variable) for variable in wrapped.variables]


def test_best_model_is_kept(tmp_path: Path) -> None:
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False, kernel_initializer="zeros")])
    model.compile(keras.optimizers.SGD(RATE), lambda y, output: (output - 1) ** 2)
    ones = np.ones([1, 1])
    values: list[float] = []

    class Note(keras.callbacks.Callback):
        def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
            values.append(float(self.model.weights[0][0, 0]))
            if epoch == 1:
                self.model.set_weights([np.full([1, 1], 5.0)])  # worse from now on

    best = callbacks.BestModelCheckpoint(monitor="loss", save_weights_only=True)
    with pytest.raises(lt.ConfigurationError, match="set the attribute filepath"):
        model.fit(ones, ones, verbose=0, callbacks=[best])
    best.filepath = str(tmp_path / "best.weights.h5")
    model.fit(ones, ones, epochs=3, verbose=0, callbacks=[best, Note()])
    model.load_weights(best.filepath)
    assert float(model.weights[0][0, 0]) == values[1]

    whole = hvd_keras.callbacks.BestModelCheckpoint("loss", 0, "min", filepath=str(tmp_path / "best.keras"))
    model.compile(keras.optimizers.SGD(RATE), "mse")
    model.fit(ones, ones, epochs=1, verbose=0, callbacks=[whole])
    assert keras.saving.load_model(tmp_path / "best.keras").get_weights() == model.get_weights()


def test_each_epoch_is_a_line_in_the_log_of_the_run(shared_path: Path) -> None:
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1, use_bias=False)])
    model.compile(lt.SlowMo(keras.optimizers.SGD(RATE), model=model, period=2), "mse")
    written: list[int] = []
    callback = lt.RunLogCallback(shared_path, with_consensus=True, to=lambda _numbers, step: written.append(step))
    for _ in range(2):  # the same log, whatever the number of calls
        x = np.full([BATCHES, 1], 1.0 + lt.rank())
        model.fit(x, x, batch_size=1, epochs=2, verbose=0, callbacks=[callback])
    header, *lines = [json.loads(line) for line in (shared_path / "run.jsonl").read_text().splitlines()]
    assert header["ranks"] == lt.size()
    assert [line["step"] for line in lines] == [BATCHES * epoch for epoch in (1, 2, 3, 4)]
    assert lines[-1]["loss"] < lines[0]["loss"]
    assert "consensus_distance" in lines[-1]
    assert written == ([line["step"] for line in lines] if lt.rank() == 0 else [])


def test_a_log_needs_an_optimizer_of_lentando(shared_path: Path) -> None:
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
    with pytest.raises(lt.ConfigurationError, match="needs an optimizer of Lentando's, got SGD"):
        model.fit(np.ones([1, 1]), np.ones([1, 1]), verbose=0, callbacks=[lt.RunLogCallback(shared_path)])
