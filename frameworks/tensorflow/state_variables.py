"""The variables of a Keras optimizer: which belongs to which parameter, and which begin as copies of parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import keras
import numpy as np

__all__ = ["StateVariable", "names_of_copies", "native", "state_variables"]


def native(variable: Any) -> Any:
    """The ``tf.Variable`` of a Keras variable."""
    return variable.value if isinstance(variable, keras.Variable) else variable


@dataclass(frozen=True)
class StateVariable:
    """A variable of an optimizer.

    Attributes:
        variable: a ``keras.Variable``.
        kind: what it is for its parameter, such as "momentum"; its name if it belongs to none.
        parameter: number of the parameter whose shape it has; None if it belongs to none.
        prefix_length: characters of its name before the kind.
    """

    variable: Any
    kind: str
    parameter: int | None = None
    prefix_length: int = 0

    @property
    def is_floating(self) -> bool:
        """Whether it is of a floating-point dtype."""
        return bool(keras.backend.is_float_dtype(self.variable.dtype))


def state_variables(optimizer: Any, parameters: Sequence[Any]) -> list[StateVariable]:
    """All variables of an optimizer that has been built, but for its learning rate, in its order.

    Keras only names the parameter in the name of a variable, and several parameters may have the same name. The
    optimizer makes the variables of one kind in the order of the parameters, which tells them apart.
    """
    by_prefix: dict[str, list[int]] = {}
    for number, parameter in enumerate(parameters):
        by_prefix.setdefault(_prefix(parameter), []).append(number)
    prefixes = sorted(by_prefix, key=lambda prefix: -len(prefix))
    taken: set[tuple[str, int]] = set()
    found = []
    for variable in optimizer.variables:
        if variable.name == "learning_rate":
            continue
        one = StateVariable(variable, variable.name)
        prefix = next((prefix for prefix in prefixes if variable.name.startswith(prefix)), None)
        for number in [] if prefix is None else by_prefix[prefix]:
            if (variable.name, number) not in taken and parameters[number].shape == variable.shape:
                taken.add((variable.name, number))
                one = StateVariable(variable, variable.name.removeprefix(str(prefix)), number, len(str(prefix)))
                break
        found.append(one)
    return found


def names_of_copies(optimizer: Any, parameters: Sequence[Any], state: Sequence[StateVariable]) -> set[str]:
    """The kinds of variables that begin as copies of the parameters, such as the "momentum" of ScheduleFreeAdamW.

    A new optimizer of the same settings is built for small parameters whose elements all differ. Where that is
    impossible, since a user's class cannot be made from its configuration, the optimizer itself is looked at.

    Args:
        optimizer: has been built.
        parameters: that it was built for.
        state: its variables.
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
    compared = [(one, samples[one.parameter]) for one in state if one.parameter is not None]
    differing = {one.kind for one, parameter in compared if not _is_copy(one.variable, parameter)}
    return {one.kind for one, _ in compared if not _is_constant(one.variable)} - differing


def _is_copy(variable: Any, parameter: Any) -> bool:
    return np.array_equal(native(variable).numpy(), native(parameter).numpy())


def _is_constant(variable: Any) -> bool:
    values = native(variable).numpy()
    return bool((values == values.flat[0]).all()) if values.size else True


def _prefix(variable: Any) -> str:
    """With which Keras begins the names of the optimizer's variables for a parameter."""
    path = getattr(variable, "path", None) or variable.name.replace(":", "_")
    return f"{path.replace('/', '_')}_"
