"""Forwarding of attributes of the distributed optimizer to the optimizer that it wraps."""

from typing import Any, NoReturn

import keras

from lentando.comm.errors import ConfigurationError
from lentando.tensorflow.base_optimizer import stepping_of
from lentando.tensorflow.keras_internals import moving_averages

__all__ = ["ForwardsSettings"]


class _Setting:
    """Descriptor that reads and sets an attribute of the wrapped optimizer.

    Args:
        fixed: the reason why the attribute can no longer be changed; None if it can be.
    """

    def __init__(self, fixed: str | None = None) -> None:
        self._fixed = fixed
        self._name = ""

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        return getattr(stepping_of(_base_of(instance, self._name)), self._name)

    def __set__(self, instance: Any, value: Any) -> None:
        if "_base_optimizer" not in vars(instance):
            return  # Keras's constructor sets the defaults of an optimizer that wraps nothing
        if self._fixed is not None:
            raise ConfigurationError(f"{self._name} cannot be set on an optimizer that has been wrapped: {self._fixed}")
        setattr(stepping_of(_base_of(instance, self._name)), self._name, value)


_MAKES_VARIABLES = (
    "it determines which variables the optimizer has. Pass it to the constructor of the base optimizer before wrapping"
)


class ForwardsSettings:
    """Base class of the distributed optimizer that forwards undefined attributes to the wrapped optimizer.

    Attributes of a ``LossScaleOptimizer`` take precedence over those of the optimizer inside it.
    """

    weight_decay = _Setting()
    clipnorm = _Setting()
    clipvalue = _Setting()
    global_clipnorm = _Setting()
    ema_momentum = _Setting()
    ema_overwrite_frequency = _Setting()
    use_ema = _Setting(_MAKES_VARIABLES)
    gradient_accumulation_steps = _Setting(_MAKES_VARIABLES)
    loss_scale_factor = _Setting(
        "a LossScaleOptimizer around this optimizer would skip whole steps on one rank and not on others. Put it "
        "inside: SlowMo(keras.optimizers.LossScaleOptimizer(optimizer), ...), and keep Keras from adding its own: "
        "model.compile(..., auto_scale_loss=False). A constant factor is keras.optimizers.SGD(loss_scale_factor=...)"
    )

    def __getattr__(self, name: str) -> Any:
        """An attribute that only the wrapped optimizer has, such as ``momentum``."""
        base = _base_of(self, name)
        if not name.startswith("_"):
            for optimizer in (base, stepping_of(base)):
                if hasattr(optimizer, name):
                    return getattr(optimizer, name)
        raise AttributeError(f"neither {type(self).__name__} nor {type(base).__name__}, which it wraps, has {name!r}")

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, on the wrapped optimizer if it belongs there."""
        base = vars(self).get("_base_optimizer")
        setting = vars(ForwardsSettings).get(name)
        if isinstance(setting, _Setting):
            setting.__set__(self, value)  # Keras would skip the assignment if the value appears unchanged
            return
        if base is not None and not name.startswith("_") and name not in vars(self) and not hasattr(type(self), name):
            for optimizer in (base, stepping_of(base)):
                if hasattr(optimizer, name):
                    setattr(optimizer, name, value)
                    return
        super().__setattr__(name, value)

    @property
    def _model_variables_moving_average(self) -> Any:
        """Read under this name by ``keras.callbacks.SwapEMAWeights``, which swaps the weights for their averages."""
        return moving_averages(stepping_of(_base_of(self, "_model_variables_moving_average")))

    @property
    def variables(self) -> list[Any]:
        """The variables of the wrapped optimizer. As in Horovod, ``optimizer.variables()`` is the same."""
        return _Variables(_base_of(self, "variables").variables)

    def exclude_from_weight_decay(self, var_list: Any = None, var_names: Any = None) -> None:
        """Exclude variables as on the wrapped optimizer. A graph takes it into account when it is traced again."""
        stepping_of(_base_of(self, "exclude_from_weight_decay")).exclude_from_weight_decay(var_list, var_names)

    def set_weights(self, weights: Any) -> None:
        """Set the values of ``variables``, in that order.

        Raises:
            ConfigurationError: if there are more or fewer values, or one has another shape. Nothing is changed then.
        """
        variables, values = self.variables, list(weights)
        if [tuple(variable.shape) for variable in variables] != [tuple(keras.ops.shape(value)) for value in values]:
            raise ConfigurationError(
                f"expected values for the {len(variables)} variables of the optimizer in their shapes, got "
                f"{len(values)} values, or shapes other than those of optimizer.variables"
            )
        for variable, value in zip(variables, values, strict=True):
            variable.assign(value)

    def update_step(self, gradient: Any, variable: Any, learning_rate: Any) -> NoReturn:
        """Refused, since the other ranks would not take part in the step."""
        raise ConfigurationError("update_step would step without the other ranks: call apply(gradients, variables)")

    def add_variable(self, *arguments: Any, **options: Any) -> NoReturn:
        """Refused, since the wrapped optimizer creates all variables."""
        raise ConfigurationError(
            "a distributed optimizer has no variables of its own: add them in the build method of the base optimizer"
        )

    add_variable_from_reference = add_variable
    add_optimizer_variables = add_variable


class _Variables(list[Any]):
    """A list that returns itself when it is called: ``variables`` was a method in Keras 2."""

    def __call__(self) -> "_Variables":
        return self


def _base_of(instance: Any, name: str) -> Any:
    base = vars(instance).get("_base_optimizer")
    if base is None:
        raise AttributeError(f"{name!r} does not exist before the optimizer has been wrapped")
    return base
