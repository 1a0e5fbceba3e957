"""Batch normalization whose statistics are those of the batches of all ranks."""

from typing import Any

import keras
import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Sum
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.tensorflow.reductions import allreduce

__all__ = ["SyncBatchNormalization"]


@keras.saving.register_keras_serializable("lentando")
class SyncBatchNormalization(keras.layers.BatchNormalization):  # type: ignore[misc]
    """``keras.layers.BatchNormalization`` with the mean and variance of the batches of all ranks.

    In training, output, gradients and moving statistics are those of one process with the whole batch. The batches of
    the ranks may differ in size. All ranks call the layer equally often. In inference it does not communicate.

    Args:
        fused: False; Horovod's argument, for a kernel that cannot communicate.
        process_set: the ranks whose batches belong together. It is not saved with a model.
        **options: arguments of ``keras.layers.BatchNormalization``.

    Raises:
        ConfigurationError: for ``fused=True``, ``renorm=True`` and ``synchronized=True``.

    Example:
        >>> import numpy as np, lentando.tensorflow as lt
        >>> lt.init()
        >>> layer = lt.SyncBatchNormalization()
        >>> layer(np.array([[1.0], [3.0]]), training=True).numpy().round(2).tolist()
        [[-1.0], [1.0]]
        >>> lt.shutdown()
    """

    def __init__(self, fused: bool = False, *, process_set: ProcessSet = global_process_set, **options: Any) -> None:
        if fused is not False:
            raise ConfigurationError("SyncBatchNormalization has no fused kernel: leave out fused=")
        for name in ("renorm", "synchronized"):
            if options.get(name):
                raise ConfigurationError(
                    f"SyncBatchNormalization does not support {name}=True: leave it out, or use BatchNormalization"
                )
        super().__init__(**options)
        self._process_set = process_set

    def call(self, inputs: Any, training: bool | None = None, mask: Any = None) -> Any:
        """Normalize a batch.

        Args:
            inputs: this rank's batch.
            training: whether statistics are those of the batches, not the moving ones.
            mask: the positions that count for the statistics, True or False, with one axis less than the inputs.
        """
        if not (training and self.trainable):
            return super().call(inputs, training=False, mask=mask)
        dtype = keras.backend.result_type(inputs.dtype, "float32")
        wide = tf.cast(inputs, dtype)
        mean, variance = self._moments_of_all(wide, mask)
        momentum = self.momentum
        for moving, new in ((self.moving_mean, mean), (self.moving_variance, variance)):
            moving.assign(moving * momentum + keras.ops.cast(new, moving.dtype) * (1 - momentum))
        outputs = keras.ops.batch_normalization(
            x=wide,
            mean=mean,
            variance=variance,
            axis=self.axis,
            offset=None if self.beta is None else tf.cast(self.beta, dtype),
            scale=None if self.gamma is None else tf.cast(self.gamma, dtype),
            epsilon=self.epsilon,
        )
        return tf.cast(outputs, self.compute_dtype)

    def _moments_of_all(self, inputs: Any, mask: Any) -> tuple[Any, Any]:
        """Mean and variance by channel over the batches of all ranks, with gradients through both."""
        axes = list(range(len(inputs.shape)))
        del axes[self.axis]
        if mask is None:
            weights = tf.ones([1] * len(inputs.shape), inputs.dtype)
        else:
            weights = tf.expand_dims(tf.cast(mask, inputs.dtype), -1)
        counted = tf.broadcast_to(weights, tf.shape(inputs))
        count = tf.reduce_sum(tf.stop_gradient(counted), axes)
        total, count = tf.unstack(self._sum(tf.stack([tf.reduce_sum(weights * inputs, axes), count])))
        count = tf.stop_gradient(count)
        mean = tf.math.divide_no_nan(total, count)
        shape = [1] * len(inputs.shape)
        shape[self.axis] = -1
        squares = weights * tf.square(inputs - tf.reshape(mean, shape))
        return mean, tf.math.divide_no_nan(self._sum(tf.reduce_sum(squares, axes)), count)

    def _sum(self, tensor: Any) -> Any:
        return allreduce(tensor, op=Sum, process_set=self._process_set)
