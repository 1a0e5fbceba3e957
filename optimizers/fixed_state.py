"""State of a model outside of its tensors, such as vocabularies: it is never sent, so it must be equal on all ranks."""

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
"""Descriptions of the parts of a model, each with its state as text, by name."""


@runtime_checkable
class HoldsFixedState(Protocol):
    """A framework adapter whose models may have state outside of their tensors."""

    def fixed_state(self) -> FixedState:
        """The present state of the model outside of its tensors."""


def fixed_state_of(framework: Framework) -> FixedState:
    """The state of the framework's model outside of its tensors."""
    return framework.fixed_state() if isinstance(framework, HoldsFixedState) else []


def check_fixed_state(transport: Transport, framework: Framework) -> None:
    """Check that the state outside of tensors is equal on all ranks that use one framework. Collective.

    Args:
        transport: transport that connects the ranks.
        framework: framework adapter that holds this rank's model.

    Raises:
        MismatchError: on every rank, with the first part of the model that differs, and its values by rank.
    """
    described = [[name, dict(state)] for name, state in fixed_state_of(framework)]
    by_rank = transport.allgather(np.array([fingerprint([state for _, state in described])], np.int64))
    if len(set(by_rank[:, 0].tolist())) == 1:
        return
    all_ranks = allgather_object(transport, [framework.name, described])
    frameworks = [name for name, _ in all_ranks]
    for used in set(frameworks):
        _check({rank: parts for rank, (name, parts) in enumerate(all_ranks) if name == used}, frameworks)


def _check(parts: Mapping[int, Sequence[tuple[str, Mapping[str, str]]]], frameworks: Sequence[str]) -> None:
    """Compare the ranks of one framework, whose parts are given by rank."""
    kinds = [", ".join(name for name, _ in parts.get(rank, [])) or "none" for rank in range(len(frameworks))]
    if len({len(described) for described in parts.values()}) > 1:
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
