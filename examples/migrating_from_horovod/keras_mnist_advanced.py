"""Digits of 28 x 28 pixels in Keras: augmented images, warm-up, a smaller rate on a plateau, checkpoints by rank 0.

The images are made here: a figure for each of ten classes, in noise.
"""

import argparse
import tempfile
from pathlib import Path

import horovod.keras as hvd
import keras
import numpy as np
from keras import layers

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=4)
parser.add_argument("--warmup-epochs", type=int, default=2)
parser.add_argument("--batch-size", type=int, default=32)
parser.add_argument("--images", type=int, default=1500)
args = parser.parse_args()

hvd.init()


def digits(count, seed):
    """The figures are the same for every seed, the images differ."""
    figures = np.random.default_rng(0).normal(size=(10, 7, 7)).repeat(4, axis=1).repeat(4, axis=2)
    rng = np.random.default_rng(seed)
    labels = rng.integers(10, size=count)
    images = figures[labels] + 0.5 * rng.normal(size=(count, 28, 28))
    return images[..., None].astype("float32"), keras.utils.to_categorical(labels, 10)


x_train, y_train = digits(args.images, seed=1)
x_test, y_test = digits(400, seed=2)

model = keras.Sequential(
    [
        keras.Input((28, 28, 1)),
        layers.RandomTranslation(0.04, 0.04),
        layers.Conv2D(8, 3, activation="relu"),
        layers.Conv2D(16, 3, activation="relu"),
        layers.MaxPooling2D(2),
        layers.Dropout(0.25),
        layers.Flatten(),
        layers.Dense(32, activation="relu"),
        layers.Dropout(0.25),
        layers.Dense(10, activation="softmax"),
    ]
)

initial_lr = 0.002 * hvd.size()
opt = hvd.DistributedOptimizer(keras.optimizers.Adam(initial_lr))
model.compile(loss="categorical_crossentropy", optimizer=opt, metrics=["accuracy"], jit_compile=False)

callbacks = [
    # All ranks begin with the weights of rank 0.
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    # Before ReduceLROnPlateau, which then decides the same on every rank.
    hvd.callbacks.MetricAverageCallback(),
    hvd.callbacks.LearningRateWarmupCallback(initial_lr=initial_lr, warmup_epochs=args.warmup_epochs, verbose=1),
    keras.callbacks.ReduceLROnPlateau(verbose=1),
]
with tempfile.TemporaryDirectory() as temporary:
    if hvd.rank() == 0:
        callbacks.append(keras.callbacks.ModelCheckpoint(Path(temporary, "checkpoint-{epoch}.keras")))
    # Each rank takes its share of the steps, from all images in an order of its own.
    order = np.random.default_rng(hvd.rank()).permutation(len(x_train))[: len(x_train) // hvd.size()]
    model.fit(
        x_train[order],
        y_train[order],
        batch_size=args.batch_size,
        callbacks=callbacks,
        epochs=args.epochs,
        verbose=2 if hvd.rank() == 0 else 0,
        validation_data=(x_test, y_test),
    )

loss, accuracy = model.evaluate(x_test, y_test, verbose=0)
if hvd.rank() == 0:
    print(f"test: loss {loss:.4f}, accuracy {accuracy:.4f} on {hvd.size()} ranks", flush=True)
