"""Broadcasts of variables: those of a model, of an optimizer, or of a graph of TensorFlow 1."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import tensorflow as tf

from lentando.comm.process_sets import ProcessSet, global_process_set
from lentando.comm.shared_order import in_shared_order
from lentando.tensorflow.exchanges import broadcast
from lentando.tensorflow.python_calls import unconverted
from lentando.tensorflow.session_graphs import is_session_graph

__all__ = ["BroadcastGlobalVariablesHook", "broadcast_", "broadcast_global_variables", "broadcast_variables"]


@unconverted
def broadcast_variables(
    variables: Iterable[Any] | Mapping[str, Any],
    root_rank: int,
    process_set: ProcessSet = global_process_set,
    inplace: bool = False,
) -> Any:
    """Assign the root rank's values to the variables of the same name on every rank, in place.

    Args:
        variables: ``model.variables``, ``optimizer.variables``, or variables by name, in any order. Several variables
            with one name are matched by their order.
        root_rank: rank whose values all ranks receive, by its number in the whole job.
        process_set: the participating ranks.
        inplace: no effect: values are always assigned to the variables.

    Returns:
        In a graph of TensorFlow 1, the operation that a session must run; otherwise None.

    Raises:
        MismatchError: on every rank, if names, shapes or dtypes differ, with the difference.
    """
    pairs = variables.items() if isinstance(variables, Mapping) else [(_name(v), v) for v in variables]
    named: list[tuple[str, Any]] = list(pairs)
    described = [(name, f"{tf.as_dtype(v.dtype).base_dtype.name} {list(v.shape)}") for name, v in named]
    if tf.executing_eagerly():
        order = in_shared_order("broadcast_variables", described, root_rank, process_set)
    else:  # nothing is sent while a graph is traced; each broadcast compares its name when it runs
        order = sorted(range(len(named)), key=lambda number: described[number][0])
    assigned = []
    for number in order:
        name, variable = named[number]
        assigned.append(variable.assign(broadcast(variable, root_rank, name, process_set=process_set)))
    return tf.group(*assigned) if is_session_graph() else None


@unconverted
def broadcast_(
    variables: Sequence[Any], root_rank: int, name: str | None = None, process_set: ProcessSet = global_process_set
) -> list[Any]:
    """Assign the root rank's values to variables on every rank, in place, and return the new values.

    Args:
        variables: the variables, in the same order on all ranks.
        root_rank: rank whose values all ranks receive, by its number in the whole job.
        name: name of the operation, which is compared between ranks, together with the names of the variables.
        process_set: the participating ranks.

    Raises:
        MismatchError: on every rank, if names, shapes or dtypes differ.
    """
    values = []
    for variable in variables:
        full_name = _name(variable) if name is None else f"{name} {_name(variable)}"
        assigned = variable.assign(broadcast(variable, root_rank, full_name, process_set=process_set))
        with tf.control_dependencies([] if tf.executing_eagerly() else tf.nest.flatten(assigned)):
            values.append(tf.identity(variable))
    return values


def broadcast_global_variables(root_rank: int) -> Any:
    """Return the operation that assigns the root rank's values to all variables of a graph of TensorFlow 1.

    Args:
        root_rank: rank whose values all ranks receive.

    Raises:
        RuntimeError: in eager code, which has no collection of all variables.
    """
    if tf.executing_eagerly():
        raise RuntimeError(
            "broadcast_global_variables needs a graph of TensorFlow 1, which knows its variables: use "
            "broadcast_variables(model.variables, root_rank)"
        )
    return broadcast_variables(tf.compat.v1.global_variables(), root_rank)


class BroadcastGlobalVariablesHook(tf.compat.v1.train.SessionRunHook):  # type: ignore[misc]
    """Broadcasts all variables of a graph when a ``tf.compat.v1.train.MonitoredSession`` starts.

    Args:
        root_rank: rank whose values all ranks receive.
        device: device on which values are received.
    """

    def __init__(self, root_rank: int, device: str = "") -> None:
        super().__init__()
        self._root_rank = root_rank
        self._device = device
        self._operation: Any = None

    def begin(self) -> None:
        """Add the broadcast to the graph. Called by the session."""
        if self._operation is None or self._operation.graph is not tf.compat.v1.get_default_graph():
            with tf.device(self._device):
                self._operation = broadcast_global_variables(self._root_rank)

    def after_create_session(self, session: Any, coord: Any) -> None:
        """Run the broadcast. Called by the session.

        Args:
            session: the new session.
            coord: coordinator of its threads.
        """
        session.run(self._operation)


def _name(variable: Any) -> str:
    return str(getattr(variable, "path", None) or variable.name)
