"""What a framework adapter implements for checkpoints, in addition to ``lentando.optimizers.framework``."""

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, runtime_checkable

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.layers import Layer
from lentando.optimizers.checkpoint.optimizer_state import NeutralState, OptimizerState
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.save_on_signal import SaveOnSignal
from lentando.optimizers.replica.stopping import StopHandle
from lentando.optimizers.replica.uneven_data import Joinable

__all__ = ["Checkpointed", "Training", "trainings_of"]


class Training(Protocol):
    """A model with its optimizer, which can be saved and resumed.

    Attributes:
        replica: the replica that trains the model. Its framework adapter holds the model.
    """

    replica: Replica

    def optimizer_state(self) -> OptimizerState:
        """The base optimizer's state, complete."""

    def check_optimizer_state(self, state: OptimizerState) -> None:
        """Raise ``CheckpointError`` if ``store_optimizer_state`` would be impossible."""

    # One of the methods that replace the state is called last, when model and replica have been restored.

    def store_optimizer_state(self, state: OptimizerState) -> None:
        """Replace the base optimizer's state by one that this framework has saved."""

    def check_neutral_state(self, state: NeutralState) -> None:
        """Raise ``CheckpointError`` if ``store_neutral_state`` would be impossible."""

    def store_neutral_state(self, state: NeutralState) -> None:
        """Replace the base optimizer's state by that of another framework."""

    def new_optimizer_state(self) -> None:
        """Replace the base optimizer's state by that of an optimizer that has taken no step."""

    def random_state(self) -> dict[str, Array]:
        """The states of the random generators that this rank's training draws from, by name, as integer arrays."""

    def restore_random_state(self, state: Mapping[str, Array]) -> None:
        """Continue with generator states that ``random_state`` returned. Ignores generators that do not exist here."""

    def layers(self) -> Sequence[Layer] | None:
        """Descriptions of the model's layers, None if they are not known."""

    def to_plain(self, extra: Any) -> Any:
        """The program's ``extra`` with arrays in place of the framework's tensors, to be saved."""

    def from_plain(self, extra: Any) -> Any:
        """A loaded ``extra`` as the program gets it back."""

    def stopping(self, stop: SaveOnSignal) -> StopHandle:
        """Save the training on signals from now on. Returns the handle for the program."""


@runtime_checkable
class Checkpointed(Joinable, Protocol):
    """An optimizer that can be saved with the model that it trains."""

    def training(self) -> Training:
        """Model, optimizer and replica, for a checkpoint."""


def trainings_of(optimizer: Checkpointed | Mapping[str, Checkpointed]) -> dict[str, Training]:
    """The trainings of one or several optimizers, by name, in the same order on all ranks.

    Args:
        optimizer: an optimizer, which gets the empty name, or a dict of several by name.

    Raises:
        ConfigurationError: for other objects, names that are empty or no text, an optimizer that is given twice, and
            optimizers of different groups of ranks.
    """
    if not isinstance(optimizer, Mapping):
        return {"": _training_of(optimizer, "")}
    names = list(optimizer)
    if not names or not all(isinstance(name, str) and name for name in names):
        raise ConfigurationError(
            f"expected a dict of optimizers by name (text that is not empty), got the keys {names}"
        )
    trainings = {name: _training_of(optimizer[name], f" for {name!r}") for name in sorted(names)}
    replicas = [training.replica for training in trainings.values()]
    if len({id(replica) for replica in replicas}) < len(replicas):
        raise ConfigurationError(f"one optimizer is given under several of the names {names}: give each once")
    if len({id(replica.transport) for replica in replicas}) > 1:
        raise ConfigurationError(f"the optimizers {names} do not train on the same ranks: save each separately")
    return trainings


def _training_of(optimizer: Any, where: str) -> Training:
    if not isinstance(optimizer, Checkpointed):
        raise ConfigurationError(
            f"expected a DistributedOptimizer{where}, got {type(optimizer).__name__}: wrap it first"
        )
    return optimizer.training()
