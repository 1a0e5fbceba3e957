"""The reduction of a step's gradients outside of ``DistributedOptimizer``: local ones, sparse ones, groups."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Adasum, Average, Op, Sum
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.tensorflow.compression import Compression, Compressor
from lentando.tensorflow.local_variables import LocalVariables
from lentando.tensorflow.reductions import grouped_allreduce
from lentando.tensorflow.sparse_tensors import as_dense

__all__ = ["GradientReduction"]


@dataclass
class GradientReduction:
    """Reduces the gradients of some variables over the ranks, in one message per dtype, and scales those of others.

    Args:
        device_dense: device of reduced tensors.
        device_sparse: device of reduced ``tf.IndexedSlices``.
        compression: how tensors are rounded while they are sent.
        sparse_as_dense: whether ``tf.IndexedSlices`` are reduced as tensors of all rows; otherwise the rows that the
            ranks have are gathered.
        op: ``Average``, ``Sum`` or ``Adasum``.
        gradient_predivide_factor: factor by which gradients are divided before the average and multiplied after it.
        process_set: the participating ranks. Other ranks keep their own gradients.
        scale_local_gradients: whether the gradients of local variables are divided by the number of ranks.

    Attributes:
        local: the local variables.

    Raises:
        ConfigurationError: for arguments that exclude each other.
    """

    device_dense: str = ""
    device_sparse: str = ""
    compression: type[Compressor] = Compression.none
    sparse_as_dense: bool = False
    op: Op = Average
    gradient_predivide_factor: float = 1.0
    process_set: ProcessSet = global_process_set
    scale_local_gradients: bool = True
    local: LocalVariables = field(init=False)

    def __post_init__(self) -> None:
        self.local = LocalVariables(lambda: len(self.process_set.ranks), self.scale_local_gradients)
        if self.op not in (Average, Sum, Adasum):
            found = self.op.name if isinstance(self.op, Op) else repr(self.op)
            raise ConfigurationError(f"op must be one of Average, Sum, Adasum, got {found}")
        if self.gradient_predivide_factor != 1 and self.op is not Average:
            raise ConfigurationError(
                f"gradient_predivide_factor splits an average: leave it out with op={self.op.name}"
            )

    def __call__(self, gradients: Sequence[Any], variables: Sequence[Any]) -> list[Any]:
        """Reduce gradients.

        Args:
            gradients: gradients; None for a variable without one, which then has none on any rank.
            variables: the variable of each.
        """
        if not self.process_set.included():
            return list(gradients)
        if self.sparse_as_dense:
            gradients = [as_dense(gradient) for gradient in gradients]
        local = [variable in self.local for variable in variables]
        sent = [g for g, is_local in zip(gradients, local, strict=True) if g is not None and not is_local]
        factor = self.gradient_predivide_factor
        reduced = iter(
            grouped_allreduce(
                sent,
                None,
                self.device_dense,
                self.device_sparse,
                self.compression,
                self.op,
                1.0 / factor,
                factor,
                self.process_set,
                name="gradients",
            )
        )
        return [
            None if g is None else self.local.gradient(g) if is_local else next(reduced)
            for g, is_local in zip(gradients, local, strict=True)
        ]
