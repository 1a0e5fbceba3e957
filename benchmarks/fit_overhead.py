"""What an optimizer step costs in Keras's fit between outer steps, over the bare Keras optimizer's.

    python benchmarks/fit_overhead.py
    mpirun -np 2 python benchmarks/fit_overhead.py

The network is that of examples/digits_tensorflow.py. Models train in turn, an epoch each, in the same run, so that
whatever else the machine does meets all alike; and several of each kind, because two of the same kind differ by a few
percent. The period lies beyond the end: what is timed sends nothing.
"""

import argparse
import os
import statistics
import time

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf

import lentando.tensorflow as lt


def make_model() -> keras.Model:
    layers = keras.layers
    return keras.Sequential(
        [
            layers.Input((8, 8, 1)),
            layers.Conv2D(16, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.MaxPooling2D(2),
            layers.Conv2D(32, 3, padding="same", use_bias=False),
            layers.BatchNormalization(),
            layers.ReLU(),
            layers.Flatten(),
            layers.Dense(10),
        ]
    )


class BatchTimes(keras.callbacks.Callback):
    """Records the seconds of each batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seconds: list[float] = []

    def on_train_batch_begin(self, batch: int, logs: object = None) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, batch: int, logs: object = None) -> None:
        self.seconds.append(time.perf_counter() - self._started)


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", type=int, default=6, help="models of each kind (default 6)")
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each model (default 12)")
    parser.add_argument("--batches", type=int, default=50, help="batches of an epoch (default 50)")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a batch (default 16)")
    options = parser.parse_args()

    lt.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    generator = np.random.default_rng(lt.rank())
    count = options.batches * options.batch_size
    images = generator.normal(size=(count, 8, 8, 1)).astype(np.float32)
    labels = generator.integers(0, 10, count)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(options.batch_size)

    times: dict[str, list[float]] = {"bare": [], "again": [], "wrapped": []}
    for _ in range(options.models):
        models = {}
        for name in times:
            model = models[name] = make_model()
            optimizer = keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True)
            if name == "wrapped":
                optimizer = lt.SlowMo(optimizer, model=model, period=10 * options.epochs * options.batches)
            model.compile(optimizer=optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            model.fit(data, shuffle=False, verbose=0)
        for epoch in range(options.epochs):
            for name in list(times) if epoch % 2 else reversed(list(times)):  # none always comes last
                callback = BatchTimes()
                models[name].fit(data, shuffle=False, verbose=0, callbacks=[callback])
                times[name].append(statistics.median(callback.seconds))
    bare_us, wrapped_us = (1e6 * statistics.median(times[name]) for name in ("bare", "wrapped"))

    def added(name: str) -> float:
        """In percent, by epochs that followed each other, against both bare models."""
        bare = [(one + other) / 2 for one, other in zip(times["bare"], times["again"], strict=True)]
        return 100 * (statistics.median(ours / theirs for ours, theirs in zip(times[name], bare, strict=True)) - 1)

    if lt.rank() == 0:
        print(
            f"{lt.size()} rank(s), {options.models} models of each kind, {options.epochs} alternating epochs of "
            f"{options.batches} batches, medians: bare {bare_us:.0f} us per batch, wrapped {wrapped_us:.0f} us; the "
            f"wrapper adds {added('wrapped'):.1f} % (one bare model against the other: {added('again'):.1f} %)"
        )


if __name__ == "__main__":
    main()
