"""What the checkpoint states of all frameworks have in common."""

from collections.abc import Mapping, Sequence
from typing import Any

from lentando.comm.errors import CheckpointError
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.layers import Layer
from lentando.optimizers.checkpoint.optimizer_state import NeutralState, OptimizerState, Reading, Tensors
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.save_on_signal import SaveOnSignal
from lentando.optimizers.replica.stopping import StopHandle

__all__ = ["ReplicaTraining", "by_key", "with_full_names"]


class ReplicaTraining:
    """Base class of every framework's ``lentando.optimizers.checkpoint.training.Training``.

    As it is, it saves and restores what the framework adapter returns as ``optimizer_buffers``, under names of the form
    PARAMETER.KEY. A framework overrides the hooks (the methods that begin with an underscore) for optimizers that keep
    more than that, or that other frameworks can continue, and the other methods where the framework needs them.

    Args:
        replica: replica that trains the model, to which all steps have been reported.
        optimizer: the base optimizer.
    """

    def __init__(self, replica: Replica, optimizer: object) -> None:
        self.replica = replica
        self._kind = type(optimizer).__name__

    def optimizer_state(self) -> OptimizerState:
        tensors = by_key(self.replica.framework.optimizer_buffers())
        return OptimizerState(
            self._kind, tensors, self._rest(), *self._reading(tensors), is_empty=not self._has_state(tensors)
        )

    def check_optimizer_state(self, state: OptimizerState) -> None:
        present = by_key(self.replica.framework.optimizer_buffers())
        differing = self._names(state.tensors, state.rest) ^ self._names(present, self._rest())
        if differing:
            raise CheckpointError(
                f"the saved {state.kind} and the present one have different variables, they differ in "
                f"{sorted(differing)[:3]}: construct it with the same settings, or load with optimizer_state='new'"
            )

    def store_optimizer_state(self, state: OptimizerState) -> None:
        self.replica.framework.store_optimizer_buffers(with_full_names(state.tensors))
        self._store_rest(state.rest)

    def check_neutral_state(self, state: NeutralState) -> None:
        state.check(self._kind, *self._rule())

    def store_neutral_state(self, state: NeutralState) -> None:
        raise NotImplementedError

    def new_optimizer_state(self) -> None:
        self.replica.framework.reset_optimizer()

    def random_state(self) -> dict[str, Array]:
        """The states of random generators; none for programs that keep their generators themselves."""
        return {}

    def restore_random_state(self, state: Mapping[str, Array]) -> None:
        """Continue with the states that ``random_state`` returned."""

    def layers(self) -> Sequence[Layer] | None:
        return None

    def to_plain(self, extra: Any) -> Any:
        return extra

    def from_plain(self, extra: Any) -> Any:
        """The saved object, in which arrays remain NumPy arrays."""
        return extra

    def stopping(self, stop: SaveOnSignal) -> StopHandle:
        return stop

    def _rest(self) -> Any:
        """The state of the base optimizer outside ``optimizer_buffers``, such as counts of steps."""
        return {}

    def _store_rest(self, rest: Any) -> None:
        """Restore what ``_rest`` returned."""

    def _names(self, tensors: Tensors, rest: Any) -> set[str]:
        """Names by which a saved state is compared with the present one."""
        return set(with_full_names(tensors))

    def _has_state(self, tensors: Tensors) -> bool:
        """Whether the base optimizer has a state that is worth saving."""
        return any(array.any() for by_name in tensors.values() for array in by_name.values())

    def _rule(self) -> tuple[str | None, set[str]]:
        """The update rule and the names of its state, as in ``Reading``; None for one that no other framework has."""
        return None, set()

    def _reading(self, tensors: Tensors) -> tuple[Reading | None, str]:
        """How other frameworks read the state, and the reason if they cannot."""
        return None, "only SGD, Adam and AdamW are the same in several frameworks"


def by_key(buffers: Mapping[str, Array]) -> dict[str, dict[str, Array]]:
    """Arrays by key, then by name of the parameter.

    Args:
        buffers: arrays by names of the form PARAMETER.KEY.
    """
    tensors: dict[str, dict[str, Array]] = {}
    for full_name, array in buffers.items():
        name, _, key = full_name.rpartition(".")
        tensors.setdefault(key, {})[name] = array
    return tensors


def with_full_names(tensors: Tensors) -> dict[str, Array]:
    """Arrays by names of the form PARAMETER.KEY: the inverse of ``by_key``."""
    return {f"{name}.{key}": array for key, by_name in tensors.items() for name, array in by_name.items()}
