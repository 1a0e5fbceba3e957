"""``DistributedGradientTape``: a ``tf.GradientTape`` whose gradients are reduced over all ranks."""

from collections.abc import Iterable, Sequence
from typing import Any

import keras
import tensorflow as tf

from lentando.comm.operations import Average, Op
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.tensorflow.compression import Compression, Compressor
from lentando.tensorflow.gradient_reduction import GradientReduction
from lentando.tensorflow.local_variables import variables_of_layers
from lentando.tensorflow.python_calls import unconverted
from lentando.tensorflow.variable_groups import check_variable_groups

__all__ = ["DistributedGradientTape", "PartialDistributedGradientTape"]


class DistributedGradientTape:
    """A ``tf.GradientTape`` whose gradients are reduced over all ranks, for training loops with a plain optimizer.

    Args:
        gradtape: the tape, which has recorded already or is used as a context manager through this object.
        device_dense: device of reduced tensors, such as ``"/cpu:0"``.
        device_sparse: device of reduced ``tf.IndexedSlices``.
        compression: how gradients are rounded while they are sent.
        sparse_as_dense: whether ``tf.IndexedSlices`` (gradients of embeddings) are reduced as tensors of all rows;
            otherwise the rows that the ranks have are gathered.
        op: ``Average`` (the default), ``Sum`` or ``Adasum``.
        gradient_predivide_factor: factor by which gradients are divided before the average and multiplied after it.
        num_groups: older name of ``groups``.
        groups: number of groups, or lists of variables, whose gradients Horovod sends together. It is checked, and has
            no effect: all gradients are sent together.
        process_set: the ranks that train together. On other ranks the tape returns its own gradients.
        scale_local_gradients: whether gradients of local sources are divided by the number of ranks, so that they have
            the same weight as averages.

    Raises:
        ConfigurationError: for arguments that exclude each other.

    Example:
        >>> import lentando.tensorflow as lt
        >>> lt.init()
        >>> weight = tf.Variable(3.0)
        >>> with lt.DistributedGradientTape(tf.GradientTape()) as tape:
        ...     loss = weight * weight
        >>> tape.gradient(loss, [weight])[0].numpy().item()
        6.0
        >>> lt.shutdown()
    """

    def __init__(
        self,
        gradtape: tf.GradientTape,
        device_dense: str = "",
        device_sparse: str = "",
        compression: type[Compressor] = Compression.none,
        sparse_as_dense: bool = False,
        op: Op = Average,
        gradient_predivide_factor: float = 1.0,
        num_groups: int = 0,
        groups: int | Sequence[Iterable[Any]] | None = None,
        process_set: ProcessSet = global_process_set,
        scale_local_gradients: bool = True,
    ) -> None:
        check_variable_groups(1, num_groups, groups)
        self._tape = gradtape
        self._reduce = GradientReduction(
            device_dense,
            device_sparse,
            compression,
            sparse_as_dense,
            op,
            gradient_predivide_factor,
            process_set,
            scale_local_gradients,
        )

    def __enter__(self) -> "DistributedGradientTape":
        self._tape.__enter__()
        return self

    def __exit__(self, *exception: Any) -> None:
        self._tape.__exit__(*exception)

    def __getattr__(self, name: str) -> Any:
        """Any other attribute of the tape."""
        return getattr(self._tape, name)

    def register_local_source(self, source: Any) -> None:
        """Leave out the gradient of a source that every rank has for itself, such as its part of an embedding.

        Args:
            source: the variable.
        """
        self._reduce.local.register(source)

    @unconverted
    def gradient(
        self,
        target: Any,
        sources: Any,
        output_gradients: Any = None,
        use_generic_names: bool = False,
        **options: Any,
    ) -> Any:
        """The tape's gradients, reduced over all ranks in one message per dtype.

        A source without a gradient must have none on any rank.

        Args:
            target: as for ``tf.GradientTape.gradient``.
            sources: variables and tensors, in any nested structure.
            output_gradients: as for ``tf.GradientTape.gradient``.
            use_generic_names: no effect: names do not depend on the model.
            **options: further arguments of ``tf.GradientTape.gradient``.
        """
        gradients = self._tape.gradient(target, sources, output_gradients, **options)
        reduced = iter(self._reduce(tf.nest.flatten(gradients), tf.nest.flatten(sources)))
        return tf.nest.map_structure(lambda _: next(reduced), sources)

    def get_local_and_global_gradients(
        self,
        target: Any,
        sources: Sequence[Any],
        output_gradients: Any = None,
        use_generic_names: bool = False,
    ) -> tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]:
        """Pairs of source and gradient: those of local sources, and those that were reduced.

        Args:
            target: as for ``gradient``, like all arguments that follow.
            sources: list of variables.
            output_gradients: as for ``tf.GradientTape.gradient``.
            use_generic_names: no effect.
        """
        pairs = list(zip(sources, self.gradient(target, sources, output_gradients), strict=True))
        local = self._reduce.local
        return [pair for pair in pairs if pair[0] in local], [pair for pair in pairs if pair[0] not in local]


def PartialDistributedGradientTape(  # noqa: N802 - Horovod's name
    gradtape: tf.GradientTape,
    device_dense: str = "",
    device_sparse: str = "",
    compression: type[Compressor] = Compression.none,
    sparse_as_dense: bool = False,
    op: Op = Average,
    gradient_predivide_factor: float = 1.0,
    num_groups: int = 0,
    groups: int | Sequence[Iterable[Any]] | None = None,
    process_set: ProcessSet = global_process_set,
    local_layers: keras.Layer | Iterable[keras.Layer] | None = None,
    scale_local_gradients: bool = True,
) -> DistributedGradientTape:
    """Return a ``DistributedGradientTape`` that leaves out the gradients of some layers.

    Args:
        gradtape: as for ``DistributedGradientTape``, like all arguments that are not listed below.
        device_dense: device of reduced tensors.
        device_sparse: device of reduced ``tf.IndexedSlices``.
        compression: how gradients are rounded while they are sent.
        sparse_as_dense: whether ``tf.IndexedSlices`` are reduced as tensors.
        op: the way in which gradients are combined.
        gradient_predivide_factor: factor before and after the average.
        num_groups: older name of ``groups``.
        groups: no effect.
        process_set: the ranks that train together.
        local_layers: a layer or layers, which have been built, that every rank has for itself.
        scale_local_gradients: whether gradients of these layers are divided by the number of ranks.

    Raises:
        ConfigurationError: for local layers that are not layers, or have not been built.
    """
    variables = variables_of_layers(local_layers)
    tape = DistributedGradientTape(
        gradtape,
        device_dense,
        device_sparse,
        compression,
        sparse_as_dense,
        op,
        gradient_predivide_factor,
        num_groups,
        groups,
        process_set,
        scale_local_gradients,
    )
    for variable in variables:
        tape.register_local_source(variable)
    return tape
