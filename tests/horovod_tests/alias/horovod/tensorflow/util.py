"""The test of Horovod's that its tests use."""

import tensorflow as tf


def _executing_eagerly() -> bool:
    return bool(tf.executing_eagerly())
