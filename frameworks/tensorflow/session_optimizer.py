"""Distributed optimizer for those of TensorFlow 1 (``tf.compat.v1.train``): in sessions, and in eager code."""

from collections.abc import Iterable, Sequence
from typing import Any

import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.comm.operations import Adasum, Average, Op
from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.tensorflow.compression import Compression, Compressor
from lentando.tensorflow.gradient_reduction import GradientReduction
from lentando.tensorflow.variable_groups import check_variable_groups

__all__ = ["SessionOptimizer", "new_optimizer"]


class SessionOptimizer(tf.compat.v1.train.Optimizer):  # type: ignore[misc]
    """An optimizer of TensorFlow 1 whose gradients are reduced over all ranks when they are computed.

    ``DistributedOptimizer`` makes it of such an optimizer. As in Horovod, the weights are not broadcast: use
    ``BroadcastGlobalVariablesHook``, or run ``broadcast_global_variables`` in the session.

    Args:
        optimizer: the base optimizer, a ``tf.compat.v1.train.Optimizer``.
        name: as for ``DistributedOptimizer``, like all further arguments without description.
        use_locking: no effect: the base optimizer has its own setting.
        device_dense: device of reduced tensors.
        device_sparse: device of reduced ``tf.IndexedSlices``.
        compression: ``Compression.none``, ``fp16`` or ``bf16``.
        sparse_as_dense: whether ``tf.IndexedSlices`` (gradients of embeddings) are reduced as tensors of all rows;
            otherwise the rows that the ranks have are gathered.
        backward_passes_per_step: 1.
        op: ``Average`` or ``Sum``.
        gradient_predivide_factor: factor by which gradients are divided before the average and multiplied after it.
        average_aggregated_gradients: no effect, with one backward pass per step.
        num_groups: older name of ``groups``.
        groups: checked, without effect: all gradients are sent together.
        process_set: the ranks that train together.
        scale_local_gradients: whether gradients of local variables are divided by the number of ranks.
        **settings: refused: Lentando's methods need a Keras optimizer.

    Raises:
        ConfigurationError: for arguments that are possible with Keras optimizers only.
    """

    def __init__(
        self,
        optimizer: Any,
        name: str | None = None,
        use_locking: bool = False,
        device_dense: str = "",
        device_sparse: str = "",
        compression: type[Compressor] = Compression.none,
        sparse_as_dense: bool = False,
        backward_passes_per_step: int = 1,
        op: Op = Average,
        gradient_predivide_factor: float = 1.0,
        average_aggregated_gradients: bool = False,
        num_groups: int = 0,
        groups: int | Sequence[Iterable[Any]] | None = None,
        process_set: ProcessSet = global_process_set,
        scale_local_gradients: bool = True,
        **settings: Any,
    ) -> None:
        super().__init__(use_locking, name or f"Distributed{type(optimizer).__name__}")
        check_variable_groups(backward_passes_per_step, num_groups, groups)
        refused = [f"{setting}=" for setting in settings]
        refused += ["backward_passes_per_step="] if backward_passes_per_step > 1 else []
        refused += ["op=Adasum"] if op is Adasum else []
        if refused:
            raise ConfigurationError(
                f"{type(optimizer).__name__} is an optimizer of TensorFlow 1 (tf.compat.v1.train), with which "
                f"{', '.join(refused)} is not possible: wrap a Keras optimizer (keras.optimizers)"
            )
        self._optimizer = optimizer
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

    def register_local_var(self, var: Any) -> None:
        """Leave out a variable that every rank has for itself, such as its part of an embedding.

        Args:
            var: the variable.
        """
        self._reduce.local.register(var)

    def compute_gradients(self, *arguments: Any, **options: Any) -> list[tuple[Any, Any]]:
        """Pairs of reduced gradient and variable.

        Args:
            *arguments: as for the base optimizer.
            **options: as for the base optimizer.
        """
        gradients, variables = zip(*self._optimizer.compute_gradients(*arguments, **options), strict=True)
        return list(zip(self._reduce(gradients, variables), variables, strict=True))

    def apply_gradients(self, grads_and_vars: Any, global_step: Any = None, name: str | None = None) -> Any:
        """Apply gradients as the base optimizer does, without communication.

        Args:
            grads_and_vars: pairs of gradient and variable.
            global_step: variable to which 1 is added.
            name: name of the operation.
        """
        return self._optimizer.apply_gradients(grads_and_vars, global_step=global_step, name=name)

    def get_slot(self, var: Any, name: str) -> Any:
        """The variable of the base optimizer with a name for another variable, such as its momentum."""
        return self._optimizer.get_slot(var, name)

    def get_slot_names(self) -> list[str]:
        """The names of such variables."""
        names: list[str] = self._optimizer.get_slot_names()
        return names

    def variables(self) -> list[Any]:
        """The variables of the base optimizer."""
        variables: list[Any] = self._optimizer.variables()
        return variables


class _NewOptimizer:
    """``__new__`` of ``DistributedOptimizer``: no function, which ``help`` would show in place of ``__init__``."""

    def __call__(self, cls: type[Any], optimizer: Any = None, *arguments: Any, **options: Any) -> Any:
        if cls.__name__ == "DistributedOptimizer" and isinstance(optimizer, tf.compat.v1.train.Optimizer):
            return SessionOptimizer(optimizer, *arguments, **options)
        return object.__new__(cls)


new_optimizer = _NewOptimizer()
"""Makes an object of a class, or a ``SessionOptimizer`` if an optimizer of TensorFlow 1 is to be wrapped."""
