"""What one rank prepares from a checkpoint, all of it checked, before any rank changes its training."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from lentando.comm.array_module import copy_into
from lentando.comm.dtypes import numpy_dtype
from lentando.comm.errors import CheckpointError
from lentando.comm.objects import to_json
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.elements import in_memory_order
from lentando.optimizers.checkpoint.matching import check_dtypes, entries_of, matched_weights, settings_to_check
from lentando.optimizers.checkpoint.optimizer_state import NeutralState, OptimizerState
from lentando.optimizers.checkpoint.relayout import Relayout
from lentando.optimizers.checkpoint.source import Source
from lentando.optimizers.checkpoint.training import Training
from lentando.optimizers.checkpoint.tree import no_flat_state, tensor, unpack
from lentando.optimizers.checkpoint.weight_map import WeightMap
from lentando.optimizers.replica.state import check_state

__all__ = ["OptimizerStateChoice", "Restoration", "prepare"]

_log = logging.getLogger("lentando")

LAST_WITH_TEXT = 2
"""Version of a replica's state that differs from the present one only in a fingerprint of the settings as text."""

OptimizerStateChoice: TypeAlias = Literal["saved", "new"]


def prepare(
    source: Source, training: Training, given: WeightMap | None, optimizer_state: OptimizerStateChoice
) -> "Restoration":
    """Prepare everything that is to be restored. Changes nothing.

    Args:
        source: what this rank resumes from.
        training: the training that resumes.
        given: the user's map from saved tensors to those of the model, None to find one.
        optimizer_state: as for ``load``.

    Raises:
        CheckpointError, ConfigurationError: if the training cannot resume from the checkpoint.
    """
    framework = training.replica.framework
    weights = matched_weights(source, training, given)
    is_native = source.framework == framework.name and given is None
    values = {name: weights.value(name, source.model_tensor) for name in weights.by_target}
    check_dtypes(weights, values, framework)
    return Restoration(
        training,
        values,
        _replica_state(source, training, weights, is_native=is_native),
        _random_state(source, training),
        _adopt_optimizer(source, training, weights, optimizer_state, is_native=is_native),
        _warnings(source, training, weights, optimizer_state),
    )


@dataclass(frozen=True)
class Restoration:
    """What one rank has prepared.

    Attributes:
        training: the training that resumes.
        values: new values of the model's tensors, by name.
        replica_state: new state of the replica.
        random_state: new states of the random generators.
        adopt_optimizer: replaces the state of the base optimizer.
        warnings: what the user should know.
    """

    training: Training
    values: Mapping[str, Array]
    replica_state: dict[str, Any]
    random_state: dict[str, Array]
    adopt_optimizer: Callable[[], None]
    warnings: Sequence[str]

    def adopt(self) -> None:
        """Replace the state of the training by what was prepared."""
        replica = self.training.replica
        framework = replica.framework
        replica.setup.wait_in_flight()
        framework.load()
        for buffer in framework.buffers:
            for entry, start in zip(buffer.layout.entries, buffer.layout.offsets, strict=True):
                copy_into(buffer.array[start : start + entry.size], in_memory_order(self.values[entry.name], entry))
        framework.store()
        framework.store_not_averaged(
            {name: self.values[name] for name in framework.not_averaged() if name in self.values}
        )
        replica.load_state_dict(self.replica_state)
        self.adopt_optimizer()
        framework.watch.mark()
        self.training.restore_random_state(self.random_state)


def _replica_state(source: Source, training: Training, weights: WeightMap, *, is_native: bool) -> dict[str, Any]:
    """The replica's state, for the buffers and shards here."""
    replica = training.replica
    here = replica.state_dict()
    layouts = [buffer.layout for buffer in replica.framework.buffers]
    relayout = Relayout(weights, source.layouts, layouts, here, source.own, lambda: list(source.shards()))
    state: dict[str, Any] = unpack(source.own.about["replica"], source.own.tensors, relayout.flat_state)
    if state["version"] == LAST_WITH_TEXT:
        state["version"] = here["version"]
    state |= {key: here[key] for key in ("layout", "settings")}  # compared already, by the manifest
    if source.merged is not None:
        state |= {key: here[key] for key in ("rank", "size")}
    if not is_native:
        state["rate_sums"] = _regrouped(source, training, weights, state["rate_sums"], len(here["rate_sums"]))
    check_state(state, replica.setup)
    return state


def _regrouped(
    source: Source, training: Training, weights: WeightMap, sums: Sequence[float], groups: int
) -> list[float]:
    """Sums by parameter group, for other groups of the same parameters."""
    saved_groups = {entry.name: entry.group for entry in source.entries}
    by_group: list[set[float]] = [set() for _ in range(groups)]
    for entry in entries_of(training.replica.framework):
        if entry.group is None:
            continue
        for rule in weights.by_target[entry.name]:
            group = saved_groups.get(rule.source)
            if group is None:
                raise CheckpointError(f"{entry.name!r} is trained here, but was not when the checkpoint was saved")
            by_group[entry.group].add(sums[group])
    for number, values in enumerate(by_group):
        if len(values) > 1:
            raise CheckpointError(
                f"parameter group {number} joins groups whose learning rates differed in the round in progress: save "
                "at the end of a round (right after an outer step)"
            )
    return [values.pop() if values else 0.0 for values in by_group]


def _random_state(source: Source, training: Training) -> dict[str, Array]:
    """States of this rank's random generators: none from another framework or another number of ranks.

    Ranks that were added would otherwise draw what rank 0 draws. Checkpoints of older versions have none.
    """
    if source.merged is not None or source.framework != training.replica.framework.name:
        return {}
    own = source.own
    saved: dict[str, Array] = unpack(own.about.get("random", to_json({})), own.tensors, no_flat_state)
    here = {name: (array.dtype, array.shape) for name, array in training.random_state().items()}
    fitting = {name: array for name, array in saved.items() if here.get(name) == (array.dtype, array.shape)}
    if unfitting := sorted(saved.keys() & here.keys() - fitting.keys()):
        _log.warning(
            "rank %d: the saved states of the random generators %s have another form than this version of the "
            "framework's: these generators continue as they are, so dropout draws other masks than it would have",
            training.replica.transport.rank,
            unfitting,
        )
    return fitting


def _adopt_optimizer(
    source: Source, training: Training, weights: WeightMap, choice: OptimizerStateChoice, *, is_native: bool
) -> Callable[[], None]:
    """What replaces the state of the base optimizer, once that is known to be possible."""
    tensors, about = source.own
    described = about["optimizer"]
    by_key = {
        key: {name: tensor(tensors, f"optimizer/{key}/{name}") for name in names}
        for key, names in described["names"].items()
    }
    state = OptimizerState.from_json(described, by_key, unpack(about["optimizer rest"], tensors, no_flat_state))
    if choice == "new":
        return training.new_optimizer_state
    if is_native and state.kind == training.optimizer_state().kind:
        training.check_optimizer_state(state)
        return lambda: training.store_optimizer_state(state)
    if state.is_empty:
        return training.new_optimizer_state
    neutral = _renamed(source, weights, state.neutral())
    training.check_neutral_state(neutral)
    return lambda: training.store_neutral_state(neutral)


def _renamed(source: Source, weights: WeightMap, state: NeutralState) -> NeutralState:
    """The same state by the names and in the axes of the model here."""
    mapped = {rule.source for rule in weights.rules.values()}
    if unknown := sorted({name for by_name in state.quantities.values() for name in by_name} - mapped):
        raise CheckpointError(f"the saved optimizer state is of parameters that are not mapped: {unknown[:5]}")
    entries = {entry.name: entry for entry in source.entries}

    def mapped_quantity(by_name: Mapping[str, Array]) -> dict[str, Array]:
        def value(name: str) -> Array:
            if name in by_name:
                return by_name[name]
            return np.zeros(entries[name].shape, numpy_dtype(entries[name].dtype))  # it has not had a gradient

        return {
            target: weights.value(target, value, of_gradients=True)
            for target, rules in weights.by_target.items()
            if any(rule.source in by_name for rule in rules)
        }

    quantities = {quantity: mapped_quantity(by_name) for quantity, by_name in state.quantities.items()}
    return NeutralState(state.kind, state.rule, quantities, state.steps)


def _warnings(
    source: Source, training: Training, weights: WeightMap, optimizer_state: OptimizerStateChoice
) -> Sequence[str]:
    """What the user should know of a checkpoint of another number of ranks, or of another framework."""
    replica = training.replica
    found: list[str] = []
    if replica.transport.rank > 0:  # rank 0 logs them
        return found
    if source.merged is not None:
        found.append(source.merged.report(replica.transport.size, with_optimizer=optimizer_state == "saved"))
    if notes := settings_to_check(source, training, weights):
        listed = "".join(f"\n- {note}" for note in notes)
        found.append(
            f"the checkpoint {source.ranks.folder} of {source.framework} was loaded into {replica.framework.name}. "
            "Settings that are not weights stay the model's: make them equal if the outputs should be equal. "
            f"The checkpoint's come first:{listed}"
        )
    return found
