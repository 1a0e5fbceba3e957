"""How the recipes of the papers begin in Keras: a GPU for each rank, or a part of the cores, or simulated ranks."""

import argparse
from collections.abc import Callable
from typing import Any

import tensorflow as tf

import lentando.tensorflow as lt
from lentando.comm import simulate


def take_gpu(options: argparse.Namespace) -> None:
    """Leave the other GPUs of the machine to the other ranks."""
    gpus = tf.config.list_physical_devices("GPU")
    if gpus and not options.simulate:  # by default, TensorFlow takes the whole memory of all of them
        tf.config.set_visible_devices(gpus[lt.local_rank() % len(gpus)], "GPU")
        tf.config.experimental.set_memory_growth(gpus[lt.local_rank() % len(gpus)], True)


def start(main: Callable[[argparse.Namespace], Any], options: argparse.Namespace) -> None:
    """Train on this rank, or on as many simulated ones as ``--simulate`` says."""
    if not tf.config.list_physical_devices("GPU"):  # ranks share the cores
        tf.config.threading.set_intra_op_parallelism_threads(1)
        tf.config.threading.set_inter_op_parallelism_threads(1)
    if options.simulate:
        tf.config.run_functions_eagerly(True)  # simulated ranks cannot wait inside a graph
        simulate(lambda: main(options), size=options.simulate)
    else:
        main(options)
