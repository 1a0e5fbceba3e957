"""Horovod's ``Compression`` for TensorFlow: casts that halve the bytes which are sent."""

from typing import Any

import tensorflow as tf

from lentando.optimizers.compression import Compressor

__all__ = ["Compression", "Compressor"]


class _SixteenBits(Compressor):
    """Rounds floating-point tensors to 16 bits. Tensors of other dtypes are sent as they are."""

    @classmethod
    def compress(cls, tensor: Any) -> tuple[Any, Any]:
        dtype = tensor.dtype
        return (tf.cast(tensor, str(cls.wire_dtype)) if dtype.is_floating else tensor), dtype

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        return tf.cast(tensor, ctx) if ctx.is_floating else tensor


class _Float16(_SixteenBits):
    wire_dtype = "float16"


class _BFloat16(_SixteenBits):
    wire_dtype = "bfloat16"


class Compression:
    """The ways in which tensors can be compressed while they are sent.

    Attributes:
        none: tensors are sent as they are.
        fp16: floating-point tensors are rounded to float16, whose largest number is 65504.
        bf16: floating-point tensors are rounded to bfloat16, which has the range of float32 and 8 bits of precision.
            Horovod does not have it.

    Example:
        >>> import lentando.tensorflow as lt
        >>> small, ctx = lt.Compression.bf16.compress(tf.constant([1.0, 3.14159]))
        >>> small.dtype, lt.Compression.bf16.decompress(small, ctx).numpy().tolist()
        (tf.bfloat16, [1.0, 3.140625])
    """

    none = Compressor
    fp16 = _Float16
    bf16 = _BFloat16
