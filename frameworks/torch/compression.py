"""Horovod's ``Compression``: casts that halve the bytes which are sent."""

from typing import Any

import torch

from lentando.optimizers.compression import Compressor

__all__ = ["Compression", "Compressor"]


class _SixteenBits(Compressor):
    """Rounds floating-point tensors to 16 bits. Tensors of other dtypes are sent as they are."""

    @classmethod
    def compress(cls, tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        if not tensor.is_floating_point():
            return tensor, None
        return tensor.to(getattr(torch, str(cls.wire_dtype))), tensor.dtype

    @staticmethod
    def decompress(tensor: torch.Tensor, ctx: Any) -> torch.Tensor:
        return tensor if ctx is None else tensor.to(ctx)


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
        >>> small, ctx = Compression.bf16.compress(torch.tensor([1.0, 3.14159]))
        >>> small.dtype, Compression.bf16.decompress(small, ctx)
        (torch.bfloat16, tensor([1.0000, 3.1406]))
    """

    none = Compressor
    fp16 = _Float16
    bf16 = _BFloat16
