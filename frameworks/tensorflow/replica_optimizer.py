"""What the Keras optimizer does between steps: its state, checkpoints, and the steps that a graph has counted."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import keras
import numpy as np

from lentando.comm import operations
from lentando.comm.errors import CheckpointError, ConfigurationError
from lentando.optimizers.checkpoint.weight_map import WeightMap
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.state import copied
from lentando.optimizers.replica_optimizer import ReplicaOptimizer
from lentando.tensorflow.base_optimizer import BaseOptimizer
from lentando.tensorflow.checkpoint_state import KerasTraining
from lentando.tensorflow.convert import as_tensor
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.session_optimizer import new_optimizer
from lentando.tensorflow.steps import Steps

__all__ = ["HiddenModel", "KerasReplicaOptimizer"]


class HiddenModel:
    """Holds the model where Keras does not find it when it saves and loads the parts of an optimizer."""

    def __init__(self, model: keras.Model | None) -> None:
        self.model = model


class KerasReplicaOptimizer(ReplicaOptimizer):
    """The part of ``DistributedOptimizer`` that is used between two steps. The attributes are set there."""

    built: bool
    _base: BaseOptimizer
    _base_optimizer: keras.optimizers.Optimizer
    _hidden: HiddenModel
    _iterations: Any
    _mapping: WeightMap | None
    _model: KerasModel
    _steps: Steps

    if not TYPE_CHECKING:  # type checkers would take what it returns for an object of any type
        __new__ = new_optimizer

    def finalize_variable_values(self, var_list: Sequence[Any]) -> None:
        """Replace the weights by this rank's moving average, if the base optimizer keeps one. ``fit`` ends with it.

        Args:
            var_list: variables of the model.

        Raises:
            NonFiniteError: on this rank alone, if its weights are not finite and no outer step would report it.
        """
        if self.built and self._steps.replica is not None:
            self._steps.replica.evaluation.check_finite("fit")
        self._base_optimizer.finalize_variable_values(var_list)

    def state_dict(self) -> dict[str, Any]:
        """This rank's state that is needed to continue, in addition to the weights and ``optimizer.variables``."""
        return {"iterations": int(self._iterations), "replica": copied(self._ready_replica().state_dict())}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Restore the state that ``state_dict()`` returned, after the weights and ``optimizer.variables``.

        Args:
            state_dict: result of ``state_dict()`` on this rank.

        Raises:
            ConfigurationError: if the state is from another rank, model, method or world size.
        """
        replica = self._ready_replica()
        self._steps.counted.restart()
        replica.load_state_dict(state_dict["replica"])
        self._iterations.assign(state_dict["iterations"])
        self._steps.counted.refresh()

    def snapshot(self) -> dict[str, Any]:
        """Return a copy of the replica's state and the count of steps and backward passes for ``roll_back``."""
        sums = [np.array(variable.numpy()) for variable in self._steps.accumulated]
        return {"replica": super().snapshot(), "iterations": int(self._iterations), "accumulated": sums}

    def roll_back(self, snapshot: Mapping[str, Any]) -> None:
        """Return to a ``snapshot()`` of this rank; the caller restores the weights and the base optimizer's state."""
        self._steps.counted.restart()
        self._iterations.assign(snapshot["iterations"])
        for variable, value in zip(self._steps.accumulated, snapshot["accumulated"], strict=True):
            variable.assign(as_tensor(value))
        super().roll_back(snapshot["replica"])
        self._steps.counted.refresh()

    def adopt_rank_0(self) -> None:
        """Continue from weights and base optimizer state that have been broadcast from rank 0. Collective."""
        self._steps.counted.settle()
        self._iterations.assign(operations.broadcast_object(int(self._iterations), 0, "steps of the optimizer"))
        super().adopt_rank_0()
        self._steps.counted.ask_before_next_step()

    def training(self) -> KerasTraining:
        """What checkpoints save and restore of model, optimizer and replica."""
        if self._mapping is not None:
            raise CheckpointError(
                "a job whose ranks run different frameworks (mapping=) cannot be saved as a whole yet: save the model "
                "of each rank by the means of its framework"
            )
        replica = self._ready_replica()
        return KerasTraining(
            replica, self._model, self._base, self._hidden.model, self._iterations, self._steps.counted
        )

    def _ready_replica(self) -> Replica:
        if not self.built:
            raise ConfigurationError(
                "the optimizer has not been built: take a step first, call build(model.trainable_variables), or wrap "
                "it with model= after the model has been built"
            )
        return self._steps.ready_replica()

    def _step_along(self, rates: Sequence[float], overflow: bool) -> bool:
        # ``overflow`` is never set: a ``LossScaleOptimizer`` finds it in the averaged gradients, equally on all ranks.
        return self._steps.take_along(rates)

    def _report_steps(self) -> None:
        self._steps.counted.settle()

    def _weights_exchanged(self) -> None:
        self._steps.counted.ask_before_next_step()

    def _refresh(self) -> None:
        self._steps.counted.refresh()

    def _check_resettable(self) -> None:
        if not self._base.resets:
            raise ConfigurationError(
                "restart(base_state='reset') needs the initial values of the base optimizer, which are kept with "
                "base_buffers='reset' and on_nonfinite='skip' only: wrap it with one of these"
            )
