"""Digits of 28 x 28 pixels in Keras, with warm-up, metrics of all ranks, and checkpoints by rank 0.

The images are made here: a figure for each of ten classes, in noise.
"""

import argparse
import tempfile
from pathlib import Path

import horovod.tensorflow.keras as hvd
import numpy as np
import tensorflow as tf

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--steps", type=int, default=40, help="in an epoch, by all ranks together")
parser.add_argument("--checkpoints", type=Path, help="folder (default: a temporary one)")
args = parser.parse_args()

hvd.init()
gpus = tf.config.list_physical_devices("GPU")
for gpu in gpus:
    tf.config.experimental.set_memory_growth(gpu, True)
if gpus:
    tf.config.set_visible_devices(gpus[hvd.local_rank()], "GPU")


def digits(count, seed):
    """The figures are the same for every seed, the images differ."""
    figures = np.random.default_rng(0).normal(size=(10, 7, 7)).repeat(4, axis=1).repeat(4, axis=2)
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count)
    images = figures[labels] + 0.5 * rng.normal(size=(count, 28, 28))
    return images[..., None].astype("float32"), labels.astype("int64")


images, labels = digits(2000, seed=hvd.rank())
dataset = tf.data.Dataset.from_tensor_slices((images, labels)).repeat().shuffle(2000).batch(32)
model = tf.keras.Sequential(
    [
        tf.keras.Input((28, 28, 1)),
        tf.keras.layers.Conv2D(8, 3, activation="relu"),
        tf.keras.layers.Conv2D(16, 3, activation="relu"),
        tf.keras.layers.MaxPooling2D(pool_size=(2, 2)),
        tf.keras.layers.Dropout(0.25),
        tf.keras.layers.Flatten(),
        tf.keras.layers.Dense(32, activation="relu"),
        tf.keras.layers.Dense(10, activation="softmax"),
    ]
)

# As many times the images in a step, as many times the learning rate.
scaled_lr = 0.001 * hvd.size()
opt = tf.keras.optimizers.Adam(scaled_lr)
opt = hvd.DistributedOptimizer(opt, backward_passes_per_step=1, average_aggregated_gradients=True)
model.compile(
    loss=tf.keras.losses.SparseCategoricalCrossentropy(), optimizer=opt, metrics=["accuracy"], jit_compile=False
)

callbacks = [
    # All ranks begin with the weights of rank 0, made at random or read from a checkpoint.
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    # Before callbacks that decide by metrics.
    hvd.callbacks.MetricAverageCallback(),
    hvd.callbacks.LearningRateWarmupCallback(initial_lr=scaled_lr, warmup_epochs=3, verbose=1),
]
with tempfile.TemporaryDirectory() as temporary:
    if hvd.rank() == 0:  # others would write the same files
        folder = args.checkpoints or Path(temporary)
        callbacks.append(tf.keras.callbacks.ModelCheckpoint(folder / "checkpoint-{epoch}.keras"))
    verbose = 2 if hvd.rank() == 0 else 0
    steps = args.steps // hvd.size()
    model.fit(dataset, steps_per_epoch=steps, callbacks=callbacks, epochs=args.epochs, verbose=verbose)

loss, accuracy = model.evaluate(*digits(500, seed=1000), verbose=0)
if hvd.rank() == 0:
    print(f"test: loss {loss:.4f}, accuracy {accuracy:.4f} on {hvd.size()} ranks", flush=True)
