"""Train a small convolutional network on handwritten digits with Keras, on one or several ranks.

The ranks may be real, or simulated in one process:

    python examples/digits_tensorflow.py
    mpirun -np 4 python examples/digits_tensorflow.py --algorithm slowmo --base sgp --period 12
    mpirun -np 4 python examples/digits_tensorflow.py --compare --report runs/digits-tensorflow
    python examples/digits_tensorflow.py --algorithm osgp --simulate 16 --batch-size 8
"""

import argparse
import os
import time
from zlib import crc32

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import numpy as np
import tensorflow as tf
from digits_common import Run, arguments, load_digits, make_optimizer, train_all
from tqdm import tqdm

import lentando.tensorflow as lt
from lentando.comm import simulate


def make_model(seed: int) -> keras.Model:
    """A convolutional network from 8 x 8 pixels to 10 classes."""
    keras.utils.set_random_seed(seed)
    return keras.Sequential(
        [
            keras.layers.Input((8, 8, 1)),
            keras.layers.Conv2D(16, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.MaxPooling2D(2),
            keras.layers.Conv2D(32, 3, padding="same", use_bias=False),
            keras.layers.BatchNormalization(momentum=0.9),
            keras.layers.ReLU(),
            keras.layers.Flatten(),
            keras.layers.Dense(10),
        ]
    )


def main(options: argparse.Namespace) -> list[Run]:
    """Parse the command line and train. Returns the runs of this rank."""
    lt.init(elastic=options.elastic)
    data = load_digits(lt.rank(), lt.size())
    cross_entropy = keras.losses.SparseCategoricalCrossentropy(from_logits=True)

    def train(algorithm: str, seed: int) -> Run:
        nonlocal data
        model = make_model(seed)
        sgd = keras.optimizers.SGD(options.lr, momentum=options.momentum, nesterov=options.momentum > 0)
        optimizer = make_optimizer(lt, options, algorithm, sgd, model)

        @tf.function
        def step(images: tf.Tensor, labels: tf.Tensor) -> tf.Tensor:
            with tf.GradientTape() as tape:
                loss = cross_entropy(labels, model(images, training=True))
            gradients = tape.gradient(loss, model.trainable_variables)
            optimizer.apply(gradients, model.trainable_variables, loss=loss)
            return loss

        generator = np.random.default_rng([seed, lt.rank()])
        run = Run("tensorflow", algorithm, seed)
        started = time.perf_counter()
        about = f"{algorithm}, seed {seed}"
        epochs = tqdm(range(options.epochs), about, unit="epoch", mininterval=0.5, disable=lt.rank() != 0)
        for _ in epochs:
            if options.elastic:
                lt.barrier()  # after it, all ranks have the same size of the job
                data = load_digits(lt.rank(), lt.size())
            losses = []
            for images, labels in data.batches(options.batch_size, generator):
                losses.append(step(tf.constant(images.transpose(0, 2, 3, 1)), tf.constant(labels)))
            run.epochs.append((time.perf_counter() - started, float(np.mean([float(loss) for loss in losses]))))
            epochs.set_postfix(loss=f"{run.epochs[-1][1]:.4f}", refresh=False)
        run.seconds = time.perf_counter() - started

        run.consensus_distance = optimizer.consensus_distance()
        with optimizer.averaged():
            predicted = model(data.test_images.transpose(0, 2, 3, 1), training=False).numpy().argmax(1)
            run.checksum = crc32(b"".join(weight.numpy().tobytes() for weight in model.weights))
        run.accuracy = float((predicted == data.test_labels).mean())
        run.count(optimizer.report(), options)
        return run

    return train_all(options, lt, train)


if __name__ == "__main__":
    assert __doc__ is not None
    flags = arguments(__doc__.splitlines()[0])
    tf.config.threading.set_intra_op_parallelism_threads(1)  # ranks share the cores
    tf.config.threading.set_inter_op_parallelism_threads(1)
    if flags.simulate:
        tf.config.run_functions_eagerly(True)  # simulated ranks cannot wait inside a graph
        simulate(lambda: main(flags), size=flags.simulate)
    else:
        main(flags)
