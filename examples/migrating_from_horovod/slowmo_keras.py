"""Handwritten digits in Keras, trained on several ranks."""

import argparse

import lentando.tensorflow as hvd
import keras
from sklearn.datasets import load_digits

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=8)
args = parser.parse_args()

hvd.init()
keras.utils.set_random_seed(42)

x, y = load_digits(return_X_y=True)
x = x.astype("float32") / 16
train_x, train_y = x[hvd.rank() : 1500 : hvd.size()], y[hvd.rank() : 1500 : hvd.size()]

model = keras.Sequential([keras.Input((64,)), keras.layers.Dense(64, activation="relu"), keras.layers.Dense(10)])
optimizer = keras.optimizers.SGD(0.05 * hvd.size(), momentum=0.9)
optimizer = hvd.SlowMo(optimizer, period=12)
loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
model.compile(optimizer=optimizer, loss=loss, metrics=["accuracy"])
callbacks = [
    hvd.callbacks.BroadcastGlobalVariablesCallback(0),
    hvd.callbacks.MetricAverageCallback(),
]
model.fit(train_x, train_y, batch_size=16, epochs=args.epochs, callbacks=callbacks, verbose=2 if hvd.rank() == 0 else 0)

_, accuracy = model.evaluate(x[1500:], y[1500:], verbose=0)
if hvd.rank() == 0:
    print(f"accuracy {accuracy:.4f} on {hvd.size()} ranks", flush=True)
