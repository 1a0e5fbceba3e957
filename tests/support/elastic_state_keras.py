"""Trains in ``fit`` and in a ``tf.function`` of an elastic job with ``elastic.run``, while two of three ranks die.

    mpirun --with-ft ulfm -np 3 python elastic_state_keras.py

Rank 1 dies in the second epoch of ``fit``, rank 0 in the loop after it. The last one prints a line of JSON.
"""

import json
import sys
from typing import Any

import keras
import numpy as np
import tensorflow as tf
from elastic_state_data import (
    BATCHES,
    BATCHES_PER_COMMIT,
    DEATH_IN_FIT,
    EPOCHS,
    LOOP_COMMIT,
    LOOP_DEATH,
    LOOP_STEPS,
    MOMENTUM,
    PERIOD,
    RATE,
    ROWS,
    SLOW,
    batch,
)
from kill_points import die

import lentando.tensorflow as lt
import lentando.tensorflow.keras as hvd


def targets(x: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    return x.sum(axis=1, keepdims=True)


def new_model() -> keras.Model:
    layer = keras.layers.Dense(1, kernel_initializer="zeros", dtype="float64")
    return keras.Sequential([keras.Input([3], dtype="float64"), layer])


def weights(model: keras.Model) -> list[float]:
    return np.concatenate([w.numpy().reshape(-1) for w in model.weights]).tolist()


class Death(keras.callbacks.Callback):
    def __init__(self, state: Any) -> None:
        super().__init__()
        self.state = state

    def on_train_batch_begin(self, batch: int, logs: Any = None) -> None:
        if (self.state.epoch, batch) == DEATH_IN_FIT:
            die()


def fit(number: int, found: dict[str, Any]) -> None:
    model = new_model()
    optimizer = hvd.DistributedOptimizer(keras.optimizers.SGD(RATE, momentum=MOMENTUM))
    model.compile(optimizer, "mse")
    state = hvd.elastic.KerasState(model, epoch=0, batch=0)
    state.register_reset_callbacks([lambda: found["resets"].append([lt.rank(), lt.size()])])

    @hvd.elastic.run
    def train(state: Any) -> None:
        found["entered"].append([state.epoch, state.batch, int(optimizer.iterations)])
        callbacks = [
            hvd.elastic.UpdateBatchStateCallback(state),
            hvd.elastic.UpdateEpochStateCallback(state),
            hvd.elastic.CommitStateCallback(state, batches_per_commit=BATCHES_PER_COMMIT),
            *([Death(state)] if number == 1 else []),
        ]
        while state.epoch < EPOCHS:
            steps = range(state.epoch * BATCHES, (state.epoch + 1) * BATCHES)
            x = np.concatenate([batch(step, lt.rank()) for step in steps])
            model.fit(x, targets(x), batch_size=ROWS, shuffle=False, verbose=0, callbacks=callbacks)

    train(state)
    found |= {"fitted": weights(model), "steps": int(optimizer.iterations), "state": [state.epoch, state.batch]}


def loop(number: int, found: dict[str, Any]) -> None:
    model = new_model()
    optimizer = lt.SlowMo(keras.optimizers.SGD(RATE), period=PERIOD, slow_momentum=SLOW, base_buffers="maintain")
    optimizer.build(model.trainable_variables)
    state = lt.elastic.TensorFlowKerasState(model, optimizer, step=0)

    @tf.function
    def take(x: Any, y: Any) -> None:
        with tf.GradientTape() as tape:
            loss = tf.reduce_mean(tf.square(model(x) - y))
        optimizer.apply(tape.gradient(loss, model.trainable_variables), model.trainable_variables)

    @lt.elastic.run
    def train(state: Any) -> None:
        found["entered"].append([state.step, lt.size()])
        while state.step < LOOP_STEPS:
            if number == 0 and state.step == LOOP_DEATH:
                die()
            x = batch(state.step, lt.rank())
            take(tf.constant(x), tf.constant(targets(x)))
            state.step += 1
            if state.step % LOOP_COMMIT == 0:
                state.commit()

    train(state)
    found |= {"looped": weights(model), "rounds": optimizer.report()["rounds"]}


def main() -> None:
    lt.init(elastic=True)
    number = lt.rank()
    found: dict[str, Any] = {"number": number, "entered": [], "resets": []}
    fit(number, found)
    loop(number, found)
    sys.stdout.write(json.dumps({**found, "rank": lt.rank(), "size": lt.size()}) + "\n")


if __name__ == "__main__":
    main()
