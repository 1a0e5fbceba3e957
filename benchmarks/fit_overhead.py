"""What an optimizer step costs in Keras's fit, over the bare Keras optimizer's: between outer steps, and synchronous.

    python benchmarks/fit_overhead.py
    mpirun -np 2 python benchmarks/fit_overhead.py
    python benchmarks/run.py fit                        on 1 and 2 ranks

The network is that of examples/digits_tensorflow.py. Models train in turn, an epoch each, in the same run, so that
whatever else the machine does meets all alike; and several of each kind, because two of the same kind differ by a few
percent. SlowMo's period lies beyond the end: what is timed sends nothing. Synchronous SGD averages the gradients of
each batch.
"""

import argparse
import os
import statistics
import time
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from measuring import facts, parse, report, table
from mpi4py import MPI

import lentando.tensorflow as lt

BARE, AGAIN, BETWEEN, SYNCHRONOUS = "bare", "another bare one", "SlowMo, between outer steps", "synchronous SGD"


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=12, help="epochs of each model (default 12)")
    parser.add_argument("--batches", type=int, default=50, help="batches of an epoch (default 50)")
    parser.add_argument("--batch-size", type=int, default=16, help="images of a batch (default 16)")
    options = parse(parser, repeats=6)

    lt.init()
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(1)
    generator = np.random.default_rng(lt.rank())
    count = options.batches * options.batch_size
    images = generator.normal(size=(count, 8, 8, 1)).astype(np.float32)
    labels = generator.integers(0, 10, count)
    data = tf.data.Dataset.from_tensor_slices((images, labels)).batch(options.batch_size)

    times: dict[str, list[float]] = {name: [] for name in (BARE, AGAIN, BETWEEN, SYNCHRONOUS)}
    for _ in range(options.repeats):
        models = {}
        for name in times:
            model = models[name] = make_model()
            optimizer: Any = keras.optimizers.SGD(0.01, momentum=0.9, nesterov=True)
            if name == BETWEEN:
                optimizer = lt.SlowMo(optimizer, model=model, period=10 * options.epochs * options.batches)
            elif name == SYNCHRONOUS:
                optimizer = lt.DistributedOptimizer(optimizer, model=model)
            model.compile(optimizer=optimizer, loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True))
            model.fit(data, shuffle=False, verbose=0)
        for epoch in range(options.epochs):
            for name in list(times) if epoch % 2 else reversed(list(times)):  # none always comes last
                callback = BatchTimes()
                models[name].fit(data, shuffle=False, verbose=0, callbacks=[callback])
                times[name].append(statistics.median(callback.seconds))
    bare = [(one + other) / 2 for one, other in zip(times[BARE], times[AGAIN], strict=True)]
    where = facts(MPI.COMM_WORLD)
    if lt.rank() == 0:
        rows = []
        for name, seconds in times.items():
            ratio = statistics.median(ours / theirs for ours, theirs in zip(seconds, bare, strict=True))
            rows.append([name, f"{1e6 * statistics.median(seconds):.0f}", f"{ratio:.3f}"])
        caption = (
            f"A batch of {options.batch_size} in Keras's fit. {where}. Medians on rank 0 over {options.repeats} models "
            f"of each kind, and {options.epochs} alternating epochs of {options.batches} batches; ratios: median of "
            "epochs that followed each other, to the mean of both bare models."
        )
        report(f"{table(['optimizer', 'us per batch', 'of bare'], rows)}\n\n{caption}", options.markdown)


if __name__ == "__main__":
    main()
