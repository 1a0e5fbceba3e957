"""The base optimizer's state: as its framework has it, and as every framework can take it over.

Frameworks keep the same quantities in other conventions. Two rules are known, to which most state belongs:

- ``"momentum"``: b <- mu b + g, in the scale of gradients, free of learning rates (torch's; Keras has -lr b).
- ``"adam"``: the moments m and v, before bias correction, and the number of steps.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from lentando.comm.errors import CheckpointError
from lentando.comm.transport import Array

__all__ = ["NeutralState", "OptimizerState", "Reading"]

Tensors = Mapping[str, Mapping[str, Array]]
"""By key, then by name of the parameter whose shape they have."""


@dataclass(frozen=True)
class Reading:
    """How a framework's own state is read by others.

    Attributes:
        rule: "momentum" or "adam".
        quantities: by quantity ("momentum"; "first", "second" and perhaps "largest_second" moment): the key of the
            tensors, and the factor that makes the quantity of them.
        steps: taken so far, for "adam".
    """

    rule: str
    quantities: Mapping[str, tuple[str, float]]
    steps: int | None = None


@dataclass(frozen=True)
class OptimizerState:
    """A framework's own state of its optimizer, complete: what it needs to go on to the bit.

    Attributes:
        kind: the optimizer's class.
        tensors: floating-point tensors of the shape of a parameter.
        rest: all else: numbers, strings, lists, dicts and arrays.
        reading: how other frameworks can take it over; None if they cannot.
        obstacle: why they cannot.
        is_empty: it is that of an optimizer that has taken no step: there is nothing to take over.
    """

    kind: str
    tensors: Tensors
    rest: Any
    reading: Reading | None = None
    obstacle: str = "only SGD, Adam and AdamW are known in several frameworks"
    is_empty: bool = False

    def about(self) -> dict[str, Any]:
        """All but the tensors and the rest, as JSON."""
        return {
            "kind": self.kind,
            "reading": None if self.reading is None else asdict(self.reading),
            "obstacle": self.obstacle,
            "is_empty": self.is_empty,
        }

    @classmethod
    def from_json(cls, about: Mapping[str, Any], tensors: Tensors, rest: Any) -> "OptimizerState":
        """The inverse of ``about``."""
        reading = None if about["reading"] is None else Reading(**about["reading"])
        return cls(about["kind"], tensors, rest, reading, about["obstacle"], about["is_empty"])

    def neutral(self) -> "NeutralState":
        """The state that every framework understands.

        Raises:
            CheckpointError: if it cannot be put so.
        """
        if self.reading is None:
            raise CheckpointError(
                f"the state of {self.kind} cannot be taken over into another framework: {self.obstacle}. Save right "
                "after an outer step that resets it, or load with optimizer_state='new' to begin with a fresh one"
            )
        quantities = {
            quantity: {name: _scaled(array, factor) for name, array in self.tensors.get(key, {}).items()}
            for quantity, (key, factor) in self.reading.quantities.items()
        }
        return NeutralState(self.kind, self.reading.rule, quantities, self.reading.steps)


@dataclass(frozen=True)
class NeutralState:
    """What every framework understands.

    Attributes:
        kind: the class that it comes from, for messages.
        rule: see ``Reading``.
        quantities: by quantity, then by parameter. A parameter that is not there has zeros.
        steps: see ``Reading``.
    """

    kind: str
    rule: str
    quantities: Tensors = field(default_factory=dict)
    steps: int | None = None

    def check(self, kind: str, rule: str | None, quantities: set[str]) -> None:
        """Whether an optimizer can go on from this.

        Args:
            kind: its class, for messages.
            rule: what it follows, None if that is not known.
            quantities: what it keeps, all of it.

        Raises:
            CheckpointError: if it cannot.
        """
        if rule != self.rule or quantities != self.quantities.keys():
            mine = f"{rule} with {_listed(quantities)}" if rule else "a rule that is not known here"
            raise CheckpointError(
                f"the checkpoint holds the state of {self.kind} ({self.rule} with {_listed(self.quantities)}), but the "
                f"optimizer here is {kind} ({mine}): use the same method, or load with optimizer_state='new'"
            )


def _scaled(array: Array, factor: float) -> Array:
    return array if factor == 1 else np.asarray(array * np.asarray(factor, array.dtype))


def _listed(quantities: Mapping[str, Any] | set[str]) -> str:
    return ", ".join(sorted(quantities)) or "nothing kept"
