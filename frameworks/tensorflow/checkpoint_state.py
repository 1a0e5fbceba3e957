"""What checkpoints save and restore of a Keras model and its optimizer."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import numpy as np

from lentando.comm.errors import CheckpointError
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.layers import Layer
from lentando.optimizers.checkpoint.optimizer_state import NeutralState, Reading, Tensors
from lentando.optimizers.checkpoint.replica_training import ReplicaTraining
from lentando.optimizers.replica import Replica
from lentando.optimizers.replica.save_on_signal import SaveOnSignal
from lentando.optimizers.replica.stopping import StopHandle
from lentando.tensorflow.base_optimizer import BaseOptimizer
from lentando.tensorflow.convert import as_tensor, to_plain
from lentando.tensorflow.counted_steps import CountedSteps
from lentando.tensorflow.model import KerasModel
from lentando.tensorflow.model_layers import layers
from lentando.tensorflow.on_signal import SaveOnSignalCallback

__all__ = ["KerasTraining"]

KEYS = {"momentum": "momentum", "first": "momentum", "second": "velocity", "largest_second": "velocity_hat"}
"""Keras's names of the state of SGD and Adam, by the names that checkpoints use for all frameworks."""


class KerasTraining(ReplicaTraining):
    """Implements ``lentando.optimizers.checkpoint.training.Training`` for Keras.

    Args:
        replica: the replica, to which all steps have been reported.
        model: the framework adapter.
        optimizer: the base optimizer.
        keras_model: the user's model; None if the optimizer was wrapped without it.
        iterations: variable that counts all steps.
        counted: counter of the steps that graphs take.
    """

    def __init__(
        self,
        replica: Replica,
        model: KerasModel,
        optimizer: BaseOptimizer,
        keras_model: keras.Model | None,
        iterations: Any,
        counted: CountedSteps,
    ) -> None:
        super().__init__(replica, optimizer.stepping)
        self._model = model
        self._optimizer = optimizer
        self._keras_model = keras_model
        self._iterations = iterations
        self._counted = counted

    def store_neutral_state(self, state: NeutralState) -> None:
        rate = self._model.learning_rates()[0]
        buffers = {name: np.zeros_like(array) for name, array in self._optimizer.buffers().items()}
        for quantity, by_name in state.quantities.items():
            for name, array in by_name.items():
                # Keras stores the step that momentum takes, PyTorch the accumulated gradients.
                buffers[f"{name}.{KEYS[quantity]}"] = array * -rate if state.rule == "momentum" else array
        self._optimizer.store_buffers(buffers)
        self._begin_at(state.steps)

    def new_optimizer_state(self) -> None:
        if self._rule()[0] is None:
            if self._steps:
                raise CheckpointError(
                    f"the initial state of a {self._kind} that has taken steps is not known: load before its first step"
                )
            self._optimizer.begin()
        else:
            self._optimizer.store_buffers({name: np.zeros_like(a) for name, a in self._optimizer.buffers().items()})
        self._begin_at(0 if self._rule()[0] != "momentum" else None)

    def random_state(self) -> dict[str, Array]:
        """The state of the seed generators of the model's layers, such as dropout, numbered in model order.

        Keras stores it in variables that are not weights.
        """
        return {name: np.asarray(variable.numpy()) for name, variable in self._seeds().items()}

    def restore_random_state(self, state: Mapping[str, Array]) -> None:
        for name, variable in self._seeds().items():
            if name in state:
                variable.assign(state[name])

    def _seeds(self) -> dict[str, Any]:
        variables = [] if self._keras_model is None else self._keras_model.variables
        seeds = [variable for variable in variables if variable.name == "seed_generator_state"]
        return {f"seed generator {number}": variable for number, variable in enumerate(seeds)}

    def layers(self) -> Sequence[Layer] | None:
        return None if self._keras_model is None else layers(self._keras_model, self._model.names_by_id())

    def to_plain(self, extra: Any) -> Any:
        return to_plain(extra, "extra")

    def stopping(self, stop: SaveOnSignal) -> StopHandle:
        self._counted.refresh()  # graphs have to call Python more often from now on
        return SaveOnSignalCallback(stop)

    def _rest(self) -> dict[str, Any]:
        others = {name: np.asarray(v.numpy()) for name, v in self._optimizer.others().items()}
        return {"variables": others, "iterations": int(self._iterations)}

    def _store_rest(self, rest: Any) -> None:
        for name, variable in self._optimizer.others().items():
            variable.assign(as_tensor(rest["variables"][name]))
        self._continue_at(rest["iterations"])

    def _names(self, tensors: Tensors, rest: Any) -> set[str]:
        return {*super()._names(tensors, rest), *rest["variables"]}

    def _has_state(self, tensors: Tensors) -> bool:
        return self._steps > 0 or super()._has_state(tensors)

    def _begin_at(self, steps: int | None) -> None:
        """Set the count of steps, by which Keras corrects Adam's bias and evaluates learning-rate schedules."""
        taken = self.replica.inner_steps * (self._optimizer.accumulation_steps or 1)
        self._optimizer.own_iterations.assign(taken if steps is None else steps)
        self._continue_at(taken)

    def _continue_at(self, iterations: int) -> None:
        """Set the count of all steps, and have graphs ask the replica before their next step."""
        self._iterations.assign(iterations)
        self._counted.restart()
        self._counted.refresh()

    @property
    def _steps(self) -> int:
        return int(self._optimizer.stepping.iterations)

    def _rule(self) -> tuple[str | None, set[str]]:
        """The update rule and the names of its state, as in the source of ``keras.optimizers``; None if not known."""
        optimizer = self._optimizer.stepping
        if optimizer.use_ema or self._optimizer.accumulation_steps:
            return None, set()
        if type(optimizer) is keras.optimizers.SGD:
            return "momentum", {"momentum"} if optimizer.momentum else set()
        if type(optimizer) in (keras.optimizers.Adam, keras.optimizers.AdamW):
            return "adam", {"first", "second", *({"largest_second"} if optimizer.amsgrad else set())}
        return None, set()

    def _reading(self, tensors: Tensors) -> tuple[Reading | None, str]:
        rule, quantities = self._rule()
        if rule is None:
            return (
                None,
                "only SGD, Adam and AdamW, without use_ema and gradient accumulation, exist in other frameworks",
            )
        if rule == "adam":
            return Reading(rule, {quantity: (KEYS[quantity], 1.0) for quantity in quantities}, self._steps), ""
        rate = self._model.learning_rates()[0]
        if rate == 0 and any(array.any() for array in tensors.get("momentum", {}).values()):
            return (
                None,
                "Keras stores momentum multiplied by the learning rate, which is 0: momentum cannot be recovered",
            )
        return Reading(rule, dict.fromkeys(quantities, ("momentum", -1 / rate if rate else 1.0))), ""
