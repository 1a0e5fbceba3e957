"""Variables of a Keras optimizer: the parameters they belong to, and which of them start as copies of parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

__all__ = ["StateVariable", "names_of_copies", "native", "state_variables"]


def native(variable: Any) -> Any:
    """The ``tf.Variable`` inside a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


@dataclass(frozen=True)
class StateVariable:
    """A variable of an optimizer, with the parameter that it belongs to.

    Attributes:
        variable: the ``keras.Variable``.
        kind: role of the variable for its parameter, such as "momentum"; its name if it belongs to no parameter.
        parameter: number of the parameter, whose shape the variable has; None if it belongs to none.
        prefix_length: number of characters of the variable's name before the kind.
    """

    variable: Any
    kind: str
    parameter: int | None = None
    prefix_length: int = 0

    @property
    def is_floating(self) -> bool:
        """Whether the variable has a floating-point dtype."""
        return bool(keras.backend.is_float_dtype(self.variable.dtype))


def state_variables(optimizer: Any, parameters: Sequence[Any]) -> list[StateVariable]:
    """All variables of a built optimizer except its learning rate, in the optimizer's order.

    The only link from a variable to its parameter is the name, which several parameters may share. Since the optimizer
    creates the variables of each kind in the order of the parameters, that order distinguishes them.
    """
    by_prefix: dict[str, list[int]] = {}
    for number, parameter in enumerate(parameters):
        by_prefix.setdefault(_prefix(parameter), []).append(number)
    prefixes = sorted(by_prefix, key=lambda prefix: -len(prefix))
    taken: set[tuple[str, int]] = set()
    state = []
    for variable in optimizer.variables:
        if variable.name == "learning_rate":
            continue
        entry = StateVariable(variable, variable.name)
        prefix = next((prefix for prefix in prefixes if variable.name.startswith(prefix)), None)
        for number in [] if prefix is None else by_prefix[prefix]:
            if (variable.name, number) not in taken and parameters[number].shape == variable.shape:
                taken.add((variable.name, number))
                entry = StateVariable(variable, variable.name.removeprefix(str(prefix)), number, len(str(prefix)))
                break
        state.append(entry)
    return state


def names_of_copies(optimizer: Any, parameters: Sequence[Any], state: Sequence[StateVariable]) -> set[str]:
    """The kinds of variables that start as copies of the parameters, such as the "momentum" of ScheduleFreeAdamW.

    They are found by building a new optimizer of the same settings for small parameters whose elements all differ. If a
    user's class cannot be constructed from its configuration, the variables of the optimizer itself are compared.

    Args:
        optimizer: the optimizer, built.
        parameters: parameters that the optimizer was built for.
        state: variables of the optimizer.
    """
    shapes = {(2,) * len(parameter.shape) for parameter in parameters}
    samples = [
        keras.Variable(
            np.arange(3, 4 + 2 ** len(shape))[: 2 ** len(shape)].reshape(shape), "float32", name=f"sample_{len(shape)}"
        )
        for shape in shapes
    ]
    try:
        new = type(optimizer).from_config({**optimizer.get_config(), "learning_rate": 0.0})
        new.build(samples)
    except Exception:  # noqa: BLE001 - a user's class may raise anything
        samples = list(parameters)
        if not all(variable.is_initialized() for variable in map(native, parameters)):
            return set()
    else:
        state = state_variables(new, samples)
    compared = [(entry, samples[entry.parameter]) for entry in state if entry.parameter is not None]
    differing = {entry.kind for entry, parameter in compared if not _is_copy(entry.variable, parameter)}
    return {entry.kind for entry, _ in compared if not _is_constant(entry.variable)} - differing


def _is_copy(variable: Any, parameter: Any) -> bool:
    return np.array_equal(native(variable).numpy(), native(parameter).numpy())


def _is_constant(variable: Any) -> bool:
    values = native(variable).numpy()
    return bool((values == values.flat[0]).all()) if values.size else True


def _prefix(variable: Any) -> str:
    """The beginning of the names that Keras gives the optimizer's variables for a parameter."""
    path = getattr(variable, "path", None) or variable.name.replace(":", "_")
    return f"{path.replace('/', '_')}_"
