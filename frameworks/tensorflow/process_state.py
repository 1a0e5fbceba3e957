"""TensorFlow's global random generator, of which the simulator keeps one for each of its ranks.

``lentando.comm.simulation`` imports this module when a simulation begins, if ``lentando.tensorflow`` has been imported.
Keras draws its seeds from Python's generator, which the simulator keeps apart as well.
"""

import tensorflow as tf

__all__ = ["restore", "save", "start"]


def save() -> tf.random.Generator:
    """Return the current global generator."""
    return tf.random.get_global_generator()


def restore(generator: tf.random.Generator) -> None:
    """Install a generator that ``save`` returned."""
    tf.random.set_global_generator(generator)


def start(seed: int, rank: int) -> None:
    """Install a new generator for a rank that begins, seeded by the simulation's seed and the rank."""
    tf.random.set_global_generator(tf.random.Generator.from_seed([seed, rank]))
