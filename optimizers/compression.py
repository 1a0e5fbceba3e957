"""What Horovod's ``Compression`` has in common in all frameworks: the compressor that changes nothing."""

from typing import Any, ClassVar

from lentando.optimizers.rules.rounding import SixteenBits

__all__ = ["Compressor"]


class Compressor:
    """A pair of functions around a collective. Subclass it, and override both, to compress in another way.

    The functions for tensors (``allreduce`` and others), and ``DistributedGradientTape`` of TensorFlow, take any
    compressor. ``DistributedOptimizer`` reduces all gradients together, and takes those of ``Compression`` only.

    Attributes:
        wire_dtype: 16-bit dtype to which ``DistributedOptimizer`` rounds what it sends; None to send it as it is.
    """

    wire_dtype: ClassVar[SixteenBits | None] = None

    @staticmethod
    def compress(tensor: Any) -> tuple[Any, Any]:
        """Return the tensor to send, and what ``decompress`` needs to know."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Any, ctx: Any) -> Any:
        """Return the received tensor in the form that the caller expects."""
        return tensor
