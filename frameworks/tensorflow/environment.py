"""Checks of Keras and TensorFlow settings that a distributed optimizer depends on."""

import keras
import tensorflow as tf

from lentando.comm.errors import ConfigurationError

__all__ = ["check_environment"]


def check_environment() -> None:
    """Check that Keras runs on TensorFlow 2, outside of any ``tf.distribute`` strategy.

    Raises:
        ConfigurationError: if it does not.
    """
    if keras.backend.backend() != "tensorflow":
        raise ConfigurationError(
            f"Keras runs on {keras.backend.backend()!r} here, and lentando.tensorflow needs it on TensorFlow: set "
            "KERAS_BACKEND=tensorflow before Keras is imported, or use lentando.torch without Keras"
        )
    if not tf.compat.v1.executing_eagerly_outside_functions():
        raise ConfigurationError("TensorFlow 2 is needed, with tf.compat.v1.disable_eager_execution() not called")
    if tf.distribute.has_strategy():
        raise ConfigurationError(
            f"{type(tf.distribute.get_strategy()).__name__} of tf.distribute averages gradients too: remove it, and "
            "start one process per device instead"
        )
