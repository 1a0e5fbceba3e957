"""Horovod's elastic states for TensorFlow: variables, and Keras models with their optimizers."""

from collections.abc import Callable, Sequence
from functools import wraps
from typing import Any, Concatenate, ParamSpec, TypeVar

import keras
import numpy as np
import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.elastic_state import ObjectState, State, run_fn
from lentando.optimizers.replica_optimizer import ReplicaOptimizer
from lentando.tensorflow.convert import as_tensor
from lentando.tensorflow.functions import broadcast_object, broadcast_variables
from lentando.tensorflow.names import by_number, by_number_alone
from lentando.tensorflow.original_errors import original_errors

__all__ = ["ObjectState", "State", "TensorFlowKerasState", "TensorFlowState", "run"]

P = ParamSpec("P")
R = TypeVar("R")
S = TypeVar("S", bound=State)


def run(func: Callable[Concatenate[S, P], R]) -> Callable[Concatenate[S, P], R]:
    """Call a training function again, from the state that was committed last, as often as ranks die meanwhile.

    See ``lentando.optimizers.elastic_state.run_fn``. A death that a graph has noticed counts, too.

    Args:
        func: function whose first argument is the ``State``, such as a ``TensorFlowKerasState``.

    Example:
        >>> import tensorflow as tf, lentando.tensorflow as lt
        >>> lt.init()
        >>> state = lt.elastic.TensorFlowState([tf.Variable(1.0)], step=0)
        >>> @lt.elastic.run
        ... def train(state):
        ...     while state.step < 3:
        ...         state.variables[0].assign_add(1.0)
        ...         state.step += 1
        ...         state.commit()
        ...     return float(state.variables[0])
        >>> train(state)
        4.0
        >>> lt.shutdown()
    """

    @wraps(func)
    def with_original_errors(state: S, /, *arguments: P.args, **options: P.kwargs) -> R:
        with original_errors():
            return func(state, *arguments, **options)

    return run_fn(with_original_errors)


class TensorFlowState(ObjectState):
    """State of TensorFlow variables, and of objects as ``ObjectState`` has them.

    Args:
        variables: the variables, in the same order on all ranks; by default those of TensorFlow 1's collection.
        session: None: there are no sessions in TensorFlow 2.
        **kwargs: initial value of each further attribute.
    """

    def __init__(self, variables: Sequence[Any] | None = None, session: None = None, **kwargs: Any) -> None:
        if session is not None:
            raise ConfigurationError("session= is for TensorFlow 1: leave it out")
        self.variables = list(tf.compat.v1.global_variables() if variables is None else variables)
        self._values = _values_of(self.variables)
        super().__init__(broadcast_object, **kwargs)

    def save(self) -> None:
        """Save variables and attributes in memory."""
        self._values = _values_of(self.variables)
        super().save()

    def restore(self) -> None:
        """Return to the values that were saved last."""
        _assign(self.variables, self._values)
        super().restore()

    def sync(self) -> None:
        """Make rank 0's present values those of every rank, and save them. Collective."""
        names = [f"{number} {variable.name}" for number, variable in enumerate(self.variables)]
        broadcast_variables(dict(zip(names, self.variables, strict=True)), 0)
        self._values = _values_of(self.variables)
        super().sync()


class TensorFlowKerasState(ObjectState):
    """State of a Keras model and its optimizer, and of objects as ``ObjectState`` has them.

    For a ``DistributedOptimizer`` of Lentando, the counts of its steps and its outer momentum are part of the state;
    gossip begins again from the restored weights. Seeds (of dropout) are saved and restored, but not synchronized.

    Args:
        model: the model, which has been built.
        optimizer: the optimizer; by default that of the compiled model. It is built for the model here: collectively,
            if it is a ``DistributedOptimizer``.
        backend: no effect; Horovod needs it with TensorFlow 1.
        **kwargs: initial value of each further attribute.

    Raises:
        ConfigurationError: if the model has not been built.
    """

    def __init__(self, model: keras.Model, optimizer: Any = None, backend: Any = None, **kwargs: Any) -> None:
        if not model.built:
            raise ConfigurationError("the model must be built first: model.build(input_shape), or call it on a batch")
        self.model = model
        self.optimizer = getattr(model, "optimizer", None) if optimizer is None else optimizer
        self.backend = backend
        if self.optimizer is not None and not self.optimizer.built:
            self.optimizer.build(model.trainable_variables)
        self._save_model()
        super().__init__(broadcast_object, **kwargs)

    def save(self) -> None:
        """Save model, optimizer and attributes in memory."""
        self._save_model()
        super().save()

    def restore(self) -> None:
        """Return to the state that was saved last."""
        _assign(self.model.variables, self._values)
        if self.optimizer is not None:
            _assign(self.optimizer.variables, self._optimizer_values)
        if isinstance(self.optimizer, ReplicaOptimizer):
            self.optimizer.roll_back(self._replica)
        super().restore()

    def sync(self) -> None:
        """Make rank 0's present state that of every rank, and save it. Collective."""
        broadcast_variables(by_number(self.model.weights), 0)
        if self.optimizer is not None:
            broadcast_variables(by_number_alone(self.optimizer.variables), 0)
        if isinstance(self.optimizer, ReplicaOptimizer):
            self.optimizer.adopt_rank_0()
        self._save_model()
        super().sync()

    def _save_model(self) -> None:
        if isinstance(self.optimizer, ReplicaOptimizer):
            self._replica = self.optimizer.snapshot()
        self._values = _values_of(self.model.variables)
        self._optimizer_values = [] if self.optimizer is None else _values_of(self.optimizer.variables)


def _values_of(variables: Sequence[Any]) -> list[Array]:
    return [np.array(variable.numpy()) for variable in variables]


def _assign(variables: Sequence[Any], values: Sequence[Array]) -> None:
    for variable, value in zip(variables, values, strict=True):
        variable.assign(as_tensor(value))
