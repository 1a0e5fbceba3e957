"""What a model computes with beside its tensors, such as vocabularies: it is never sent, so it has to be equal."""

from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import numpy as np

from lentando.comm.agreement import fingerprint
from lentando.comm.errors import MismatchError, grouped_by_rank
from lentando.comm.objects import allgather_object
from lentando.comm.transport import Transport
from lentando.optimizers.framework import Framework

__all__ = ["FixedState", "HoldsFixedState", "check_fixed_state", "fixed_state_of"]

FixedState = Sequence[tuple[str, Mapping[str, str]]]
"""Parts of a model in words, each with what it computes with, in words, by what it is called."""


@runtime_checkable
class HoldsFixedState(Protocol):
    """A framework whose models compute with more than their tensors."""

    def fixed_state(self) -> FixedState:
        """What the model computes with now beside its tensors."""


def fixed_state_of(framework: Framework) -> FixedState:
    """What the model of a framework computes with beside its tensors."""
    return framework.fixed_state() if isinstance(framework, HoldsFixedState) else []


def check_fixed_state(transport: Transport, framework: Framework) -> None:
    """Collective: do the models of all ranks that use one framework compute with the same beside their tensors?

    Raises:
        MismatchError: on every rank, with the first part of the model that differs, and how.
    """
    own = [[name, dict(state)] for name, state in fixed_state_of(framework)]
    by_rank = transport.allgather(np.array([fingerprint([state for _, state in own])], np.int64))
    if len(set(by_rank[:, 0].tolist())) == 1:
        return
    everyone = allgather_object(transport, [framework.name, own])
    for used in {name for name, _ in everyone}:
        parts = {rank: found for rank, (name, found) in enumerate(everyone) if name == used}
        _check(parts, [name for name, _ in everyone])


def _check(parts: Mapping[int, Sequence[tuple[str, Mapping[str, str]]]], frameworks: Sequence[str]) -> None:
    """Compare the ranks of one framework."""
    kinds = [", ".join(name for name, _ in parts.get(rank, [])) or "none" for rank in range(len(frameworks))]
    if len({len(found) for found in parts.values()}) > 1:
        raise MismatchError(f"the models' layers with state outside of weights differ: {grouped_by_rank(kinds)}")
    for number, layers in enumerate(zip(*parts.values(), strict=True)):
        for key in {key: None for _, state in layers for key in state}:
            values = [
                parts[rank][number][1].get(key, "none") if rank in parts else f"not compared ({used})"
                for rank, used in enumerate(frameworks)
            ]
            if len({values[rank] for rank in parts}) > 1:
                raise MismatchError(
                    f"{key} of the layer {layers[0][0]} differs between ranks; it is in no weight, and is never "
                    f"averaged. {grouped_by_rank(values)}. Give all ranks the same: adapt the layer to the same data "
                    "on each, before wrapping, or save it on one and load it on all"
                )
