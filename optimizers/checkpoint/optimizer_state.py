"""The base optimizer's state: as its framework stores it, and in a form that every framework can load.

Frameworks store the same quantities by different conventions. Two rules are known, which cover most state:

- ``"momentum"``: b <- mu b + g, in the scale of gradients, free of learning rates (torch's; Keras has -lr b).
- ``"adam"``: the moments m and v, before bias correction, and the number of steps.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lentando.comm.errors import CheckpointError
from lentando.comm.transport import Array

__all__ = ["NeutralState", "OptimizerState", "Reading", "Tensors"]

Tensors = Mapping[str, Mapping[str, Array]]
"""Tensors by key, then by the name of the parameter whose shape they have."""


@dataclass(frozen=True)
class Reading:
    """How other frameworks read the state of a framework's optimizer.

    Attributes:
        rule: "momentum" or "adam".
        quantities: key of the tensors that hold each quantity, and the factor by which they are multiplied. Quantities
            are "momentum", or the moments "first", "second" and perhaps "largest_second".
        steps: number of steps taken so far, for "adam".
    """

    rule: str
    quantities: Mapping[str, tuple[str, float]]
    steps: int | None = None


@dataclass(frozen=True)
class OptimizerState:
    """The complete state of a framework's optimizer, from which it resumes bit-identically.

    Attributes:
        kind: name of the optimizer's class.
        tensors: floating-point tensors of the shape of a parameter.
        rest: everything else: numbers, strings, lists, dicts and arrays.
        reading: how other frameworks can load the state; None if they cannot.
        obstacle: the reason why other frameworks cannot load it.
        is_empty: whether the optimizer has taken no step, so that there is nothing to load.
    """

    kind: str
    tensors: Tensors
    rest: Any
    reading: Reading | None = None
    obstacle: str = "only SGD, Adam and AdamW are known in several frameworks"
    is_empty: bool = False

    def about(self) -> dict[str, Any]:
        """Everything but the tensors and the rest, as JSON."""
        return {
            "kind": self.kind,
            "reading": None if self.reading is None else asdict(self.reading),
            "obstacle": self.obstacle,
            "is_empty": self.is_empty,
        }

    @classmethod
    def from_json(cls, about: Mapping[str, Any], tensors: Tensors, rest: Any) -> "OptimizerState":
        """The state that ``about`` has described, with its tensors and the rest."""
        reading = None if about["reading"] is None else Reading(**about["reading"])
        return cls(about["kind"], tensors, rest, reading, about["obstacle"], about["is_empty"])

    def neutral(self) -> "NeutralState":
        """The state in the form that every framework can load.

        Raises:
            CheckpointError: if other frameworks cannot load it.
        """
        if self.reading is None:
            raise CheckpointError(
                f"the state of {self.kind} cannot be loaded into another framework: {self.obstacle}. Save right after "
                "an outer step that resets it, or load with optimizer_state='new' to begin with a new one"
            )
        quantities = {
            quantity: {name: _scaled(array, factor) for name, array in self.tensors.get(key, {}).items()}
            for quantity, (key, factor) in self.reading.quantities.items()
        }
        return NeutralState(self.kind, self.reading.rule, quantities, self.reading.steps)


@dataclass(frozen=True)
class NeutralState:
    """Optimizer state in the form that every framework can load.

    Attributes:
        kind: name of the class that it comes from, for messages.
        rule: "momentum" or "adam", as in ``Reading``.
        quantities: tensors by quantity, then by parameter. A missing parameter has zeros.
        steps: number of steps taken so far, for "adam".
    """

    kind: str
    rule: str
    quantities: Tensors = field(default_factory=dict)
    steps: int | None = None

    def check(self, kind: str, rule: str | None, quantities: set[str]) -> None:
        """Check that an optimizer can resume from this state.

        Args:
            kind: name of the optimizer's class, for messages.
            rule: the optimizer's rule, None if it is not known.
            quantities: names of all quantities that the optimizer keeps.

        Raises:
            CheckpointError: if the optimizer follows another rule, or keeps other quantities.
        """
        if rule != self.rule or quantities != self.quantities.keys():
            here = f"{rule} with {_listed(quantities)}" if rule else "a rule that is not known here"
            raise CheckpointError(
                f"the checkpoint holds the state of {self.kind} ({self.rule} with {_listed(self.quantities)}), but the "
                f"optimizer here is {kind} ({here}): use the same method, or load with optimizer_state='new'"
            )


def _scaled(array: Array, factor: float) -> Array:
    return array if factor == 1 else np.asarray(array * np.asarray(factor, array.dtype))


def _listed(quantities: Mapping[str, Any] | set[str]) -> str:
    return ", ".join(sorted(quantities)) or "no state"
