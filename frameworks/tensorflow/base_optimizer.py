"""Access to the user's Keras optimizer: its learning rate, its state, and how to reset it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.tensorflow.convert import as_array, as_tensor
from lentando.tensorflow.keras_internals import learning_rate_setting
from lentando.tensorflow.state_variables import StateVariable, names_of_copies, native, state_variables

__all__ = ["BaseOptimizer", "ContinuedSchedule", "as_optimizer", "stepping_of"]

Schedule: Any = keras.optimizers.schedules.LearningRateSchedule


def stepping_of(optimizer: Any) -> Any:
    """The optimizer that steps: the user's, or the one in its ``LossScaleOptimizer``."""
    return optimizer.inner_optimizer if isinstance(optimizer, keras.optimizers.LossScaleOptimizer) else optimizer


def as_optimizer(optimizer: keras.optimizers.Optimizer | str) -> keras.optimizers.Optimizer:
    """A Keras optimizer, or the one with a name in Keras and Keras's default settings.

    Raises:
        ConfigurationError: for anything else.
    """
    if isinstance(optimizer, str):
        try:
            return keras.optimizers.get(optimizer)
        except ValueError as error:
            raise ConfigurationError(
                f"Keras has no optimizer {optimizer!r}: expected a name that keras.optimizers.get takes, such as "
                "'adam', or a Keras optimizer"
            ) from error
    if not isinstance(optimizer, keras.optimizers.Optimizer):
        is_legacy = type(optimizer).__module__.startswith("tf_keras.")
        raise ConfigurationError(
            f"expected a Keras 3 optimizer (keras.optimizers) to wrap, got {type(optimizer).__name__}"
            + (" of Keras 2: start the program without TF_USE_LEGACY_KERAS" if is_legacy else "")
        )
    return optimizer


class BaseOptimizer:
    """A Keras optimizer, or a ``LossScaleOptimizer`` around one. The inner optimizer is then the one that steps.

    Args:
        optimizer: the user's optimizer.
        resets: whether the optimizer may be reset at outer steps.
        iterations: variable that counts all steps, while the optimizer's own count restarts at a reset. It is set to
            the number of steps that the optimizer has taken so far.

    Raises:
        ConfigurationError: if the optimizer cannot be used.
    """

    def __init__(self, optimizer: Any, resets: bool, iterations: Any) -> None:
        self.optimizer = optimizer
        self._resets = resets
        self._iterations = iterations
        self._stepping = stepping_of(optimizer)
        if isinstance(self._stepping, keras.optimizers.MultiOptimizer):
            raise ConfigurationError(
                "slow momentum needs one learning rate, a MultiOptimizer has several: wrap one optimizer for all layers"
            )
        self.accumulation_steps: int | None = self._stepping.gradient_accumulation_steps
        if self.accumulation_steps and self._stepping is not optimizer:
            raise ConfigurationError(
                "gradient_accumulation_steps is not possible inside a LossScaleOptimizer: a rank that skips a batch "
                "because of an overflow would step later than the others. Use one of the two"
            )
        if resets and self._stepping.use_ema:
            raise ConfigurationError(
                "base_buffers='reset' and on_nonfinite='skip' set the optimizer's iterations to zero, at which Keras "
                "also restarts its moving average of the model (use_ema=True): use base_buffers='maintain' or "
                "'average', and on_nonfinite='raise'"
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
        """The current learning rate: a variable, or the value of the schedule for the next step."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if isinstance(value, Schedule) and self._resets and not isinstance(value, ContinuedSchedule):
            value = ContinuedSchedule(value, self._iterations)
        self._stepping.learning_rate = value

    def build(self, variables: Sequence[Any], names: Sequence[str | None]) -> None:
        """Create the optimizer's variables unless they exist, and record their meaning and initial values.

        The parameters must already have their initial values, since some optimizers start with copies of them.

        Args:
            variables: the parameters.
            names: unique names of the parameters; None for those whose state belongs to this rank alone.

        Raises:
            ConfigurationError: if the optimizer may be reset but its initial state is not known.
        """
        new = self._stepping
        if self._stepping.built and self._resets:  # it may have been used: take the initial values of a new one
            new = type(self._stepping).from_config(self._stepping.get_config())
            new.build(variables)
        left_out = set() if self.optimizer.built else self._build(variables)
        state = state_variables(self._stepping, variables)
        copies = names_of_copies(self._stepping, variables, state)
        self._copies = [
            (native(entry.variable), native(variables[entry.parameter]))
            for entry in state
            if entry.parameter is not None and entry.kind in copies
        ]
        copied = {id(variable) for variable, _ in self._copies}
        if left_out - copied:
            raise ConfigurationError(self._needs_weights())
        if self._resets:
            values = [entry.variable for entry in state_variables(new, variables)]
            self._fresh = [
                (native(entry.variable), _constant(value))
                for entry, value in zip(state, values, strict=True)
                if id(native(entry.variable)) not in copied
            ]
        self._buffers = {
            f"{names[entry.parameter]}.{entry.kind}": native(entry.variable)
            for entry in _by_longest_name(state)
            if entry.parameter is not None and names[entry.parameter] is not None and entry.is_floating
        }

    def _build(self, variables: Sequence[Any]) -> set[int]:
        """Create the optimizer's variables.

        Parameters that are created in a graph while it is traced have no values before it runs. Until then the
        optimizer's assignments to its own variables are skipped; ``begin`` must make them up once values exist.

        Returns:
            The ``id`` of each variable whose assignment was skipped.
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
            f"{type(self._stepping).__name__} computes its initial state from the weights, but those of this model are "
            "created inside the first step, in a graph: build the model first (model.build(shape), or call it on a "
            "batch)"
        )

    @property
    def updates(self) -> Any:
        """Number of updates of the weights, as a variable or tensor, which continues when the optimizer is reset."""
        steps = self.accumulation_steps
        return keras.ops.floor_divide(self._iterations, steps) if steps else self._iterations

    @property
    def variables(self) -> list[Any]:
        """All variables of the optimizer, as ``tf.Variable``."""
        return [native(variable) for variable in self.optimizer.variables]

    @property
    def resets(self) -> bool:
        """Whether ``reset`` may be called, which needs the initial state."""
        return self._resets

    @property
    def is_scaled(self) -> bool:
        """Whether the optimizer is wrapped in a ``LossScaleOptimizer``."""
        return self._stepping is not self.optimizer

    @property
    def stepping(self) -> Any:
        """The optimizer that steps: the user's, or the one in its ``LossScaleOptimizer``."""
        return self._stepping

    def others(self) -> dict[str, Any]:
        """Variables that are not ``buffers``, by number and name: counts, learning rate, loss scale."""
        buffers = {id(variable) for variable in self._buffers.values()}
        numbered = enumerate(self.optimizer.variables)
        return {f"{number} {v.name}": native(v) for number, v in numbered if id(native(v)) not in buffers}

    def buffers(self) -> Mapping[str, Array]:
        """The floating-point variables that have the shape of a parameter, by name."""
        return {name: as_array(variable.read_value()) for name, variable in self._buffers.items()}

    def store_buffers(self, averaged: Mapping[str, Array]) -> None:
        """Replace the values of all ``buffers``."""
        for name, variable in self._buffers.items():
            variable.assign(as_tensor(averaged[name]))

    def begin(self) -> None:
        """Copy the current weights into the variables that start as copies of the weights, before the first step.

        Weights may have been loaded since the optimizer was built. An optimizer that has taken steps is not changed.
        """
        if self._copies and int(self.own_iterations) == 0:
            self._copy_weights(_value)

    def reset(self, value: Callable[[Any], Any]) -> None:
        """Restore the initial state, Adam's step count included. Only the learning rate is kept.

        Args:
            value: function that returns the value of a parameter, of which some optimizers start with a copy.
        """
        for variable, constant in self._fresh:
            variable.assign(tf.fill(variable.shape, tf.cast(constant, variable.dtype)))
        self._copy_weights(value)

    def _copy_weights(self, value: Callable[[Any], Any]) -> None:
        for variable, parameter in self._copies:
            variable.assign(tf.cast(value(parameter), variable.dtype))


@keras.saving.register_keras_serializable("lentando")
class ContinuedSchedule(Schedule):  # type: ignore[misc]
    """The user's schedule, driven by a step count that continues when the optimizer's own count restarts.

    Args:
        schedule: the user's schedule.
        iterations: variable that counts all steps.
    """

    def __init__(self, schedule: Any, iterations: Any) -> None:
        self.schedule = schedule
        self._iterations = iterations

    def __call__(self, step: Any) -> Any:
        """The learning rate of the next step."""
        return self.schedule(self._iterations)

    def get_config(self) -> dict[str, Any]:
        """The configuration of the user's schedule, with which a saved model continues."""
        return {"schedule": keras.optimizers.schedules.serialize(self.schedule)}

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The user's schedule without this wrapper."""
        return keras.optimizers.schedules.deserialize(config["schedule"])


def _value(variable: Any) -> Any:
    return variable.read_value()


def _by_longest_name(state: Sequence[StateVariable]) -> list[StateVariable]:
    """Variables in the order that checkpoints use."""
    return sorted(state, key=lambda entry: (-entry.prefix_length, -1 if entry.parameter is None else entry.parameter))


def _constant(variable: Any) -> Any:
    """The value that all elements of a variable have."""
    values = variable.numpy()
    if values.size and (values != values.flat[0]).any():
        raise ConfigurationError(
            f"base_buffers='reset' is not possible: the initial {variable.name!r} of the optimizer depends on the "
            "parameters without being a copy of them. Use 'maintain' or 'average'"
        )
    return values.flat[0] if values.size else 0
