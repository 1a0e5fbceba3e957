"""Description of a Keras optimizer as text, by which ranks check that all have wrapped the same one."""

from typing import Any

import keras
import tensorflow as tf

from lentando.optimizers.optimizer_description import (
    OptimizerDescription,
    constructor_arguments,
    in_plain_words,
    plain_attributes,
    qualified_name,
)
from lentando.tensorflow.keras_internals import learning_rate_setting

__all__ = ["describe_optimizer", "short_description"]

NOT_COMPARED = {"self", "name", "learning_rate", "inner_optimizer"}
"""Constructor arguments without meaning for a comparison (names are numbered by process), or described separately."""


def describe_optimizer(optimizer: Any) -> OptimizerDescription:
    """The class and current settings of an optimizer, including those of the one in a ``LossScaleOptimizer``.

    A constructor argument is a setting if the optimizer has an attribute of the same name. ``get_config`` is not used:
    it raises errors for schedules and functions that cannot be saved, and may be incomplete.
    """
    kind = qualified_name(type(optimizer))
    settings: dict[str, Any] = {}
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        settings = {f"{name} of the LossScaleOptimizer": value for name, value in _settings(optimizer).items()}
        optimizer = optimizer.inner_optimizer
        kind = f"{kind} of {qualified_name(type(optimizer))}"
    settings |= _settings(optimizer)
    rate = learning_rate_setting(optimizer)
    steps = in_plain_words(optimizer.iterations, _plain)
    words = {name: in_plain_words(value, _plain) for name, value in settings.items()}
    rates = {"learning_rate": in_plain_words(rate, _plain)}
    attributes, others = plain_attributes(optimizer, {*words, *NOT_COMPARED})
    state = ", ".join(filter(None, [f"iteration {steps}", others]))
    return OptimizerDescription(kind, words, rates, state, attributes)


def short_description(optimizer: Any) -> str:
    """The class of an optimizer with its configuration as keyword arguments, for ``repr``."""
    config = optimizer.get_config()
    shown = {key: value for key, value in config.items() if key != "name" and value not in (None, False)}
    texts = [f"{key}={value:.6g}" if isinstance(value, float) else f"{key}={value!r}" for key, value in shown.items()]
    return f"{type(optimizer).__name__}({', '.join(texts)})"


def _settings(described: Any) -> dict[str, Any]:
    arguments = constructor_arguments(type(described))
    names = [name for name in arguments if name not in NOT_COMPARED and hasattr(described, name)]
    return {name: getattr(described, name) for name in names}


def _plain(value: Any) -> Any:
    if isinstance(value, keras.Variable | tf.Variable | tf.Tensor):
        array = value.numpy()
        return array.astype("float32") if array.dtype.name in ("bfloat16", "float16") else array
    if isinstance(value, keras.optimizers.schedules.LearningRateSchedule):
        return {qualified_name(type(value)): _settings(value)}
    return value
