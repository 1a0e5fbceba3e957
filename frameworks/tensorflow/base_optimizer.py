"""The user's Keras optimizer as the replica sees it: its learning rate, its state, and how it is made new."""

from collections.abc import Mapping, Sequence
from typing import Any

import keras
import tensorflow as tf

from lentando.comm.errors import ConfigurationError
from lentando.comm.transport import Array
from lentando.tensorflow.convert import as_array, as_tensor

__all__ = ["BaseOptimizer", "ContinuedSchedule", "native"]

Schedule: Any = keras.optimizers.schedules.LearningRateSchedule


def native(variable: Any) -> Any:
    """The ``tf.Variable`` of a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


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
        self._stepping = optimizer
        if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
            self._stepping = optimizer.inner_optimizer
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
        self.learning_rate = self._stepping._learning_rate  # noqa: SLF001 - Keras shows its value, not the schedule
        self._fresh: list[tuple[Any, Any]] = []
        self._buffers: dict[str, Any] = {}

    @property
    def learning_rate(self) -> Any:
        """Now: a variable, or what the schedule gives for the next step."""
        return self.optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, value: Any) -> None:
        if isinstance(value, Schedule):
            if self._resets and not isinstance(value, ContinuedSchedule):
                self._stepping.learning_rate = ContinuedSchedule(value, self._iterations)
        elif not isinstance(value, keras.Variable):
            self._stepping.learning_rate = value

    def build(self, variables: Sequence[Any], names: Sequence[str]) -> None:
        """Make the optimizer's variables, if it has none, and learn what they are and begin with."""
        new = self._stepping
        if self._stepping.built and self._resets:  # it may have been used: ask another one
            new = type(self._stepping).from_config(self._stepping.get_config())
            new.build(variables)
        if not self.optimizer.built:
            self.optimizer.build(variables)
        state = {variable.name: variable for variable in self._stepping.variables if variable.name != "learning_rate"}
        if self._resets:
            values = {variable.name: variable for variable in new.variables}
            self._fresh = [(native(variable), _constant(values[name])) for name, variable in state.items()]
        for number, variable in sorted(enumerate(variables), key=lambda item: -len(_prefix(item[1]))):
            for name in [name for name in state if name.startswith(_prefix(variable))]:
                found = native(state.pop(name))
                if found.shape == variable.shape and found.dtype.is_floating:
                    self._buffers[f"{names[number]}.{name.removeprefix(_prefix(variable))}"] = found

    @property
    def variables(self) -> list[Any]:
        """All that it holds, as ``tf.Variable``."""
        return [native(variable) for variable in self.optimizer.variables]

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

    def reset(self) -> None:
        """Make it new, Adam's step count included; only its learning rate goes on."""
        for variable, value in self._fresh:
            variable.assign(tf.fill(variable.shape, tf.cast(value, variable.dtype)))


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


def _prefix(variable: Any) -> str:
    """With which Keras begins the names of the optimizer's variables for a parameter."""
    path = getattr(variable, "path", None) or variable.name.replace(":", "_")
    return f"{path.replace('/', '_')}_"


def _constant(variable: Any) -> Any:
    """The value of all elements."""
    values = variable.numpy()
    if values.size and (values != values.flat[0]).any():
        raise ConfigurationError(
            f"base_buffers='reset': the optimizer begins with a {variable.name!r} that depends on the parameters. Use "
            "'maintain' or 'average'"
        )
    return values.flat[0] if values.size else 0
