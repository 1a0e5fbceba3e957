"""The user's Keras optimizer as the replica sees it: its learning rate, its state, and how it is made new."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.tensorflow.convert import as_array, as_tensor
from lentando.tensorflow.keras_internals import learning_rate_setting
from lentando.tensorflow.state_variables import StateVariable, names_of_copies, native, state_variables

__all__ = ["BaseOptimizer", "ContinuedSchedule", "stepping_of"]

Schedule: Any = keras.optimizers.schedules.LearningRateSchedule


def stepping_of(optimizer: Any) -> Any:
    """The optimizer that steps: the user's, or the one in its ``LossScaleOptimizer``."""
    return optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer


class BaseOptimizer:
    """A Keras optimizer, or a ``LossScaleOptimizer`` round one, which is then the one that steps.

    Args:
        optimizer: the user's.
        resets: whether outer steps may make it new.
        iterations: counts all steps, which its own count does not if it is made new. Set to what it has taken so far.

    Raises:
        ConfigurationError: if it cannot be used.
    """

    def __init__(self, optimizer: Any, resets: bool, iterations: Any) -> None:
        self.optimizer = optimizer
        self._resets = resets
        self._iterations = iterations
        self._stepping = stepping_of(optimizer)
        if isinstance(self._stepping, keras.optimizers.MultiOptimizer):
            raise ConfigurationError(
                "a MultiOptimizer has no learning rate, by which slow momentum goes: wrap one optimizer for all layers"
            )
        self.accumulation_steps: int | None = self._stepping.gradient_accumulation_steps
        if self.accumulation_steps and self._stepping is not optimizer:
            raise ConfigurationError(
                "gradient_accumulation_steps within a LossScaleOptimizer: a rank that skips a batch for an overflow "
                "would step later than the others. Use one of the two"
            )
        if resets and self._stepping.use_ema:
            raise ConfigurationError(
                "base_buffers='reset' and on_nonfinite='skip' set the optimizer's count of iterations to zero, by "
                "which Keras also begins its moving average of the model (use_ema=True): use base_buffers='maintain' "
                "or 'average', and on_nonfinite='raise'"
            )
        (self.own_iterations,) = [v for v in self._stepping.variables if v.name == "iteration"]
        iterations.assign(self.own_iterations)
        rate = learning_rate_setting(self._stepping)
        if isinstance(rate, Schedule):
            self.learning_rate = rate
        self._fresh: list[tuple[Any, Any]] = []
        self._copies: list[tuple[Any, Any]] = []
        self._buffers: dict[str, Any] = {}

    @property
    def learning_rate(self) -> Any:
        """Now: a variable, or what the schedule gives for the next step."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if isinstance(value, Schedule) and self._resets and not isinstance(value, ContinuedSchedule):
            value = ContinuedSchedule(value, self._iterations)
        self._stepping.learning_rate = value

    def build(self, variables: Sequence[Any], names: Sequence[str]) -> None:
        """Make the optimizer's variables, if it has none, and learn what they are and begin with.

        The parameters have the values with which training begins: some optimizers begin with copies of them.

        Args:
            variables: the parameters.
            names: of the parameters, each once.

        Raises:
            ConfigurationError: if outer steps are to make it new, and it is not known how.
        """
        new = self._stepping
        if self._stepping.built and self._resets:  # it may have been used: ask another one
            new = type(self._stepping).from_config(self._stepping.get_config())
            new.build(variables)
        left_out = set() if self.optimizer.built else self._build(variables)
        state = state_variables(self._stepping, variables)
        copies = names_of_copies(self._stepping, variables, state)
        self._copies = [
            (native(one.variable), native(variables[one.parameter]))
            for one in state
            if one.parameter is not None and one.kind in copies
        ]
        copied = {id(variable) for variable, _ in self._copies}
        if left_out - copied:
            raise ConfigurationError(self._needs_weights())
        if self._resets:
            values = [one.variable for one in state_variables(new, variables)]
            self._fresh = [
                (native(one.variable), _constant(value))
                for one, value in zip(state, values, strict=True)
                if id(native(one.variable)) not in copied
            ]
        self._buffers = {
            f"{names[one.parameter]}.{one.kind}": native(one.variable)
            for one in _by_longest_name(state)
            if one.parameter is not None and one.is_floating
        }

    def _build(self, variables: Sequence[Any]) -> set[int]:
        """Make the optimizer's variables.

        Parameters that are made in the graph that is being traced have no values before it runs. What the optimizer
        assigns to its own variables meanwhile is left out, and has to be what ``begin`` assigns when they have values.

        Returns:
            The ``id`` of each variable whose assignment was left out.
        """
        if all(native(variable).is_initialized() for variable in variables):
            self.optimizer.build(variables)
            return set()
        left_out: set[int] = set()
        vars(self._stepping)["assign"] = lambda variable, value: left_out.add(id(native(variable)))
        try:
            self.optimizer.build(variables)
        except (ValueError, tf.errors.OpError) as error:
            raise ConfigurationError(self._needs_weights()) from error
        finally:
            del vars(self._stepping)["assign"]
        return left_out

    def _needs_weights(self) -> str:
        return (
            f"{type(self._stepping).__name__} begins with values that it makes of the weights, and those of this model "
            "are made within the first step, in a graph: build the model before (model.build(shape), or call it on a "
            "batch)"
        )

    @property
    def variables(self) -> list[Any]:
        """All that it holds, as ``tf.Variable``."""
        return [native(variable) for variable in self.optimizer.variables]

    @property
    def resets(self) -> bool:
        """Whether ``reset`` may be called: what the optimizer began with is known."""
        return self._resets

    @property
    def is_scaled(self) -> bool:
        """Whether a ``LossScaleOptimizer`` is round it."""
        return self._stepping is not self.optimizer

    @property
    def stepping(self) -> Any:
        """The optimizer that steps: the user's, or the one in its ``LossScaleOptimizer``."""
        return self._stepping

    def others(self) -> dict[str, Any]:
        """Its variables that are no ``buffers``: counts, learning rate, loss scale."""
        buffers = {id(variable) for variable in self._buffers.values()}
        numbered = enumerate(self.optimizer.variables)
        return {f"{number} {v.name}": native(v) for number, v in numbered if id(native(v)) not in buffers}

    def buffers(self) -> Mapping[str, Array]:
        """Its floating-point variables of the shape of a parameter."""
        return {name: as_array(variable.read_value()) for name, variable in self._buffers.items()}

    def store_buffers(self, averaged: Mapping[str, Array]) -> None:
        """Replace them."""
        for name, variable in self._buffers.items():
            variable.assign(as_tensor(averaged[name]))

    def begin(self) -> None:
        """Before its first step: what begins as a copy of the weights is a copy of what they are now.

        They may have been loaded since the optimizer was built. Nothing is changed if it has been used before.
        """
        if self._copies and int(self.own_iterations) == 0:
            self._copy_weights(_value)

    def reset(self, value: Callable[[Any], Any]) -> None:
        """Make it new, Adam's step count included; only its learning rate goes on.

        Args:
            value: gives the value of a parameter, from which some optimizers begin.
        """
        for variable, constant in self._fresh:
            variable.assign(tf.fill(variable.shape, tf.cast(constant, variable.dtype)))
        self._copy_weights(value)

    def _copy_weights(self, value: Callable[[Any], Any]) -> None:
        for variable, parameter in self._copies:
            variable.assign(tf.cast(value(parameter), variable.dtype))


@keras.saving.register_keras_serializable("lentando")
class ContinuedSchedule(Schedule):  # type: ignore[misc]
    """The user's schedule, by a count that goes on when the optimizer's own begins again.

    Args:
        schedule: the user's.
        iterations: the count.
    """

    def __init__(self, schedule: Any, iterations: Any) -> None:
        self.schedule = schedule
        self._iterations = iterations

    def __call__(self, step: Any) -> Any:
        """The learning rate of the next step."""
        return self.schedule(self._iterations)

    def get_config(self) -> dict[str, Any]:
        """The user's schedule, which is what a saved model goes on with."""
        return {"schedule": keras.optimizers.schedules.serialize(self.schedule)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The user's schedule."""
        return keras.optimizers.schedules.deserialize(config["schedule"])


def _value(variable: Any) -> Any:
    return variable.read_value()


def _by_longest_name(state: Sequence[StateVariable]) -> list[StateVariable]:
    """In the order in which checkpoints have always had them."""
    return sorted(state, key=lambda one: (-one.prefix_length, -1 if one.parameter is None else one.parameter))


def _constant(variable: Any) -> Any:
    """The value of all elements."""
    values = variable.numpy()
    if values.size and (values != values.flat[0]).any():
        raise ConfigurationError(
            f"base_buffers='reset': the optimizer begins with a {variable.name!r} that depends on the parameters, and "
            "is no copy of them. Use 'maintain' or 'average'"
        )
    return values.flat[0] if values.size else 0
