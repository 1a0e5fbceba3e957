"""Loading: every rank reads and checks all that it needs; only when no rank objects is anything changed."""

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from os import PathLike
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import numpy as np

from lentando.comm.agreement import Event
from lentando.comm.array_module import copy_into
from lentando.comm.dtypes import is_floating, numpy_dtype
from lentando.comm.elastic import transaction
from lentando.comm.errors import CheckpointError, ConfigurationError
from lentando.comm.flat import Entry, build_layouts, describe, in_words
from lentando.comm.objects import broadcast_object, from_json, to_json
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint import folder as folders
from lentando.optimizers.checkpoint import weight_map as mappings
from lentando.optimizers.checkpoint.collective import run_on_all_ranks
from lentando.optimizers.checkpoint.elements import in_memory_order
from lentando.optimizers.checkpoint.layers import layers_from_json
from lentando.optimizers.checkpoint.manifest import read_manifest
from lentando.optimizers.checkpoint.optimizer_state import NeutralState, OptimizerState
from lentando.optimizers.checkpoint.pairing import differing_settings, pairs_of
from lentando.optimizers.checkpoint.relayout import Relayout
from lentando.optimizers.checkpoint.resizing import Resizing
from lentando.optimizers.checkpoint.saving import checked_path
from lentando.optimizers.checkpoint.shard_file import read_shard_file
from lentando.optimizers.checkpoint.training import Checkpointed, Training, trainings_of
from lentando.optimizers.checkpoint.tree import flat_nodes, no_flat_state, tensor, unpack
from lentando.optimizers.replica.state import check_state
from lentando.optimizers.rules.settings import different_from

__all__ = ["OptimizerStateChoice", "load"]

_log = logging.getLogger("lentando")

OptimizerStateChoice: TypeAlias = Literal["saved", "new"]


def load(
    path: str | PathLike[str],
    optimizer: Checkpointed | Mapping[str, Checkpointed],
    mapping: mappings.WeightMap | Mapping[str, mappings.WeightMap] | None = None,
    *,
    optimizer_state: OptimizerStateChoice = "saved",
) -> Any:
    """Continue from a checkpoint: bit-identical, if as many ranks of the same framework have saved it.

    Collective: every rank calls it, eagerly, between steps. The model is filled in place; the learning rates and other
    settings of the base optimizer are restored with its state, except from another framework, whose settings stay
    there. The framework's own random generators continue as they were, if as many ranks of the same framework have
    saved them; else they are left alone.

    Another number of ranks continues from the average of those that there were, with the outer step's state as it was;
    one warning says what is exact then and what is approximated.

    Args:
        path: as given to ``save``: a checkpoint, or a folder of several, of which the newest is taken.
        optimizer: a ``DistributedOptimizer`` for the same model, with the same settings; in TensorFlow, built. For a
            checkpoint of several, a dict of all of them by the names that ``save`` was given.
        mapping: from the names in the checkpoint to those of the model, where they differ. A checkpoint from another
            framework needs none if both optimizers were given ``model=``. For several optimizers, a dict by name.
        optimizer_state: "new" starts the base optimizer afresh, whatever was saved.

    Returns:
        ``extra`` as the rank of this number saved it, or else as rank 0 did; in TensorFlow, with arrays for tensors.

    Raises:
        CheckpointError: on every rank, with the reason, if one of them cannot continue from it; nothing has changed
            then.
        ConfigurationError: for arguments that cannot work.
        MismatchError: on every rank, if the ranks are not at the same step.
    """
    trainings = trainings_of(optimizer)
    if optimizer_state not in get_args(OptimizerStateChoice):
        raise ConfigurationError(f"optimizer_state must be 'saved' or 'new', got {optimizer_state!r}")
    by_name = _mappings_of(mapping, trainings)
    folder = checked_path(path)
    first = next(iter(trainings.values()))
    transport = first.replica.transport
    return first.from_plain(transaction(transport, lambda: _load(trainings, folder, by_name, optimizer_state)))


def _mappings_of(
    mapping: mappings.WeightMap | Mapping[str, mappings.WeightMap] | None, trainings: Mapping[str, Training]
) -> dict[str, mappings.WeightMap | None]:
    """The mapping of each optimizer, None for those without."""
    if mapping is None or (isinstance(mapping, mappings.WeightMap) and list(trainings) == [""]):
        return dict.fromkeys(trainings, mapping)
    if list(trainings) == [""]:
        raise ConfigurationError(f"mapping must be a WeightMap, got {type(mapping).__name__}")
    if not isinstance(mapping, Mapping) or not mapping.keys() <= trainings.keys():
        raise ConfigurationError(
            f"mapping must be a dict of WeightMaps by the names of the optimizers, {list(trainings)}, got {mapping!r}"
        )
    for name, own in mapping.items():
        if not isinstance(own, mappings.WeightMap):
            raise ConfigurationError(f"mapping[{name!r}] must be a WeightMap, got {type(own).__name__}")
    return {name: mapping.get(name) for name in trainings}


def _load(
    trainings: Mapping[str, Training],
    path: Path,
    by_name: Mapping[str, mappings.WeightMap | None],
    optimizer_state: OptimizerStateChoice,
) -> Any:
    transport = next(iter(trainings.values())).replica.transport
    for training in trainings.values():
        training.replica.meet(Event.LOAD)
    found: dict[str, Any] = {}

    def find() -> None:
        if transport.rank == 0:
            folder = folders.locate(path)
            found.update(folder=str(folder), contents=read_manifest(folder))

    run_on_all_ranks(transport, f"loading the checkpoint {path}", find)
    found = broadcast_object(transport, found)
    doing = f"loading the checkpoint {found['folder']}"
    ready: list[tuple[_Loading, Callable[[], None]]] = []

    def prepare() -> None:
        _check_names(list(found["contents"]), list(trainings))
        for name, training in trainings.items():
            content = found["contents"][name]
            loading = _Loading(training, Path(found["folder"]), content, by_name[name], optimizer_state)
            ready.append((loading, loading.prepared()))

    def adopt() -> None:
        for _, change in ready:
            change()

    run_on_all_ranks(transport, doing, prepare)
    run_on_all_ranks(transport, doing, adopt)
    for (loading, _), name in zip(ready, trainings, strict=True):
        for warning in loading.warnings if transport.rank == 0 else []:
            _log.warning("%s%s", f"{name}: " if name else "", warning)
    return ready[0][0].extra


def _check_names(saved: list[str], here: list[str]) -> None:
    if sorted(saved) == here:
        return
    if saved == [""]:
        raise CheckpointError(f"it is of one optimizer alone: give that, in place of a dict of {here}")
    wanted = "{" + ", ".join(f"{name!r}: ..." for name in sorted(saved)) + "}"
    found = "one optimizer alone" if here == [""] else f"a dict of {here}"
    raise CheckpointError(f"it is of several optimizers: expected a dict of all of them, {wanted}, got {found}")


class _Loading:
    """One rank's reading of a checkpoint.

    Raises:
        CheckpointError, ConfigurationError: if it cannot be continued from here.
    """

    def __init__(
        self,
        training: Training,
        folder: Path,
        content: dict[str, Any],
        mapping: mappings.WeightMap | None,
        optimizer_state: OptimizerStateChoice,
    ) -> None:
        self._training = training
        self._folder = folder
        self._content = content
        self._optimizer_state = optimizer_state
        replica = training.replica
        transport, self._framework, settings = replica.transport, replica.framework, replica.settings
        self._rank = transport.rank
        if found := different_from(settings, content["settings"]):
            raise CheckpointError(f"it was saved by training with other settings: {found}")
        self._saved = [Entry(name, tuple(shape), *rest) for name, shape, *rest in content["entries"]]
        self._layouts = [buffer.layout for buffer in self._framework.buffers]
        self._own = [entry for layout in self._layouts for entry in layout.entries]
        self._not_averaged = dict(self._framework.not_averaged())
        self._resizing: Resizing | None = None
        if content["world_size"] == transport.size:
            self._tensors, self._about = self._part(self._rank)
        else:
            self._resizing = Resizing(
                content["world_size"],
                self._part,
                build_layouts(self._saved),
                training.replica.base.resizing,
                self._rank,
                transport.size,
            )
            self._tensors, self._about = self._resizing.part()
        self._is_native = self._about["framework"] == self._framework.name and mapping is None
        self._mapping = self._completed(mapping)

    @property
    def warnings(self) -> list[str]:
        """What the user should know of a checkpoint of another number of ranks, or of another framework."""
        found = [] if self._resizing is None else [self._resizing.in_words(self._optimizer_state == "saved")]
        notes = self._notes()
        if notes:
            listed = "".join(f"\n- {note}" for note in notes)
            found.append(
                f"the checkpoint {self._folder} of {self._about['framework']} was loaded into {self._framework.name}. "
                "Settings that are not weights stay the model's: make them equal if the outputs should be equal. "
                f"The checkpoint's come first:{listed}"
            )
        return found

    def _notes(self) -> Sequence[str]:
        if self._mapping.notes or self._about["framework"] == self._framework.name:
            return self._mapping.notes
        saved = self._content["layers"]
        try:
            layers = self._training.layers()
        except ConfigurationError as error:  # no reason not to load: the mapping was given
            return [f"whether settings differ is not known: {error}"]
        return differing_settings(pairs_of(self._rules, layers_from_json(saved or []), layers or []))

    @property
    def extra(self) -> Any:
        """What this rank saved beside."""
        return unpack(self._about["extra"], self._tensors, no_flat_state)

    def prepared(self) -> Callable[[], None]:
        """Read and check everything; returns what then changes the training."""
        replica, framework = self._training.replica, self._framework
        model = {name: self._mapping.value(name, self._saved_tensor) for name in self._mapping.by_target}
        rest = {name: model[name] for name in self._not_averaged if name in model}
        self._check_dtypes(model)
        state = self._replica_state()
        random_state = self._random_state()
        adopt_optimizer = self._prepared_optimizer()

        def adopt() -> None:
            replica.setup.wait_in_flight()
            framework.load()
            for buffer in framework.buffers:
                for entry, start in zip(buffer.layout.entries, buffer.layout.offsets, strict=True):
                    copy_into(buffer.array[start : start + entry.size], in_memory_order(model[entry.name], entry))
            framework.store()
            framework.store_not_averaged(rest)
            replica.load_state_dict(state)
            adopt_optimizer()
            framework.watch.mark()
            self._training.restore_random_state(random_state)

        return adopt

    def _saved_tensor(self, name: str) -> Array:
        return tensor(self._tensors, f"model/{name}")

    @property
    def _rules(self) -> list[mappings.WeightRule]:
        return list(self._mapping.rules.values())

    def _completed(self, mapping: mappings.WeightMap | None) -> mappings.WeightMap:
        """The mapping for every tensor of the model: as given, or found by the layers, or by names that are equal."""
        saved = {entry.name: entry.shape for entry in self._saved}
        own = {entry.name: entry.shape for entry in self._own}
        saved_rest = {name: (tuple(shape), dtype) for name, shape, dtype in self._about["not_averaged"]}
        equal = self._content["entries"] == describe(self._layouts)
        if mapping is None and not equal:
            if self._about["framework"] == self._framework.name:
                raise CheckpointError(f"it is of another model: {self._first_difference()}")
            mapping = self._found_by_layers()
        if mapping is None:
            named = [*own, *(name for name in self._not_averaged if name in saved_rest)]
            mapping = mappings.WeightMap(mappings.WeightRule(name, name) for name in named)
        mentioned = {rule.source for rule in mapping.rules.values()}
        # Counters and the like exist in one framework only: those that no rule mentions are left where they are.
        saved |= {
            name: shape
            for name, (shape, dtype) in saved_rest.items()
            if name in mentioned or is_floating(numpy_dtype(dtype))
        }
        own |= {
            name: array.shape
            for name, array in self._not_averaged.items()
            if name in mapping.by_target or is_floating(array.dtype)
        }
        mapping.check(saved, own)
        return mapping

    def _found_by_layers(self) -> mappings.WeightMap:
        layers, saved = self._training.layers(), self._content["layers"]
        if layers is None or saved is None:
            reason = self._content["why_no_layers"] or "no model= was given here"
            raise CheckpointError(
                f"it was saved by {self._about['framework']}, and which of its tensors is which here is not known: "
                f"give mapping=, or model= to the optimizers of both frameworks ({reason})"
            )
        return mappings.WeightMap.between(layers_from_json(saved), layers)

    def _first_difference(self) -> str:
        trained_then = {entry.name for entry in self._saved if entry.group is not None}
        trained_now = {entry.name for entry in self._own if entry.group is not None}
        frozen_then = {name for name, *_ in self._about["not_averaged"]}
        same = "train the same parameters as then (requires_grad, trainable) before loading"
        if names := sorted(trained_then & self._not_averaged.keys()):
            return f"{names[0]!r} was trained when it was saved, and is frozen here: {same}"
        if names := sorted(trained_now & frozen_then):
            return f"{names[0]!r} was frozen when it was saved, and is trained here: {same}"
        saved, own = self._content["entries"], describe(self._layouts)
        for number in range(max(len(saved), len(own))):
            one, other = in_words(saved, number), in_words(own, number)
            if one != other:
                return f"its tensor number {number} is {one}, the model's is {other}"
        raise AssertionError("equal descriptions")

    def _check_dtypes(self, model: Mapping[str, Array]) -> None:
        own = {entry.name: entry.dtype for entry in self._own}
        own |= {name: array.dtype.name for name, array in self._not_averaged.items()}
        for rule in self._rules:
            found = model[rule.target].dtype.name
            if found != own[rule.target]:
                raise CheckpointError(
                    f"{rule.source!r} was saved as {found}, but {rule.target!r} is {own[rule.target]} here"
                )

    def _part(self, rank: int) -> tuple[dict[str, Array], Any]:
        parts = self._content["parts"]
        tensors, about = read_shard_file(self._folder, parts["ranks"][rank])
        state = from_json(about["replica"])
        if (state["rank"], state["size"]) != (rank, self._content["world_size"]):
            raise CheckpointError(
                f"{parts['ranks'][rank]['file']} is of rank {state['rank']} of {state['size']}, but the manifest names "
                f"it as that of rank {rank} of {self._content['world_size']}: files of the checkpoint were exchanged"
            )
        return {**tensors, **self._shared}, about

    @cached_property
    def _shared(self) -> dict[str, Array]:
        return read_shard_file(self._folder, self._content["parts"]["shared"])[0]

    def _shards(self) -> list[tuple[dict[str, Array], Any]]:
        """What every rank holds a shard of, or what has been put together of it.

        Read rank by rank, so that the rest of the parts is not held in memory.
        """
        if self._resizing is not None:
            return [(self._tensors, self._about)]
        found = []
        for rank in range(self._content["world_size"]):
            tensors, about = self._part(rank)
            paths = [path for path, node in flat_nodes(about["replica"]).items() if node["sharded"]]
            found.append(({k: v for k, v in tensors.items() if k.startswith(tuple(f"{p}/" for p in paths))}, about))
        return found

    def _replica_state(self) -> dict[str, Any]:
        own = self._training.replica.state_dict()
        saved = build_layouts(self._saved)
        mine = (self._tensors, self._about)
        relayout = Relayout(self._mapping, saved, self._layouts, own, mine, self._shards)
        state: dict[str, Any] = unpack(self._about["replica"], self._tensors, relayout.flat_state)
        if self._resizing is not None:
            state |= {key: own[key] for key in ("rank", "size")}
        # The manifest's settings and entries have been compared, and the format of the state with its version.
        state |= {key: own[key] for key in ("version", "layout", "settings")}
        if not self._is_native:
            state["rate_sums"] = self._regrouped(state["rate_sums"], len(own["rate_sums"]))
        check_state(state, self._training.replica.setup)
        return state

    def _random_state(self) -> dict[str, Array]:
        """What this rank's generators continue with: nothing from another framework or another number of ranks.

        Ranks that were added would otherwise draw what rank 0 draws. Checkpoints of older versions have none.
        """
        if self._resizing is not None or self._about["framework"] != self._framework.name:
            return {}
        saved: dict[str, Array] = unpack(self._about.get("random", to_json({})), self._tensors, no_flat_state)
        here = {name: (array.dtype, array.shape) for name, array in self._training.random_state().items()}
        fitting = {name: array for name, array in saved.items() if here.get(name) == (array.dtype, array.shape)}
        if unfitting := sorted(saved.keys() & here.keys() - fitting.keys()):
            _log.warning(
                "rank %d: the saved states of the random generators %s have another form than this version of the "
                "framework's: these generators continue as they are, so dropout draws other masks than it would have",
                self._rank,
                unfitting,
            )
        return fitting

    def _regrouped(self, sums: Sequence[float], groups: int) -> list[float]:
        """Sums by parameter group, for other groups of the same parameters."""
        source_group = {entry.name: entry.group for entry in self._saved}
        found: list[set[float]] = [set() for _ in range(groups)]
        for entry in self._own:
            if entry.group is None:
                continue
            for rule in self._mapping.by_target[entry.name]:
                group = source_group.get(rule.source)
                if group is None:
                    raise CheckpointError(f"{entry.name!r} is trained here, but was not when the checkpoint was saved")
                found[entry.group].add(sums[group])
        for number, values in enumerate(found):
            if len(values) > 1:
                raise CheckpointError(
                    f"parameter group {number} joins groups whose learning rates differed in the round under way: save "
                    "at the end of a round (right after an outer step)"
                )
        return [values.pop() if values else 0.0 for values in found]

    def _prepared_optimizer(self) -> Callable[[], None]:
        training = self._training
        about = self._about["optimizer"]
        tensors = {
            key: {name: tensor(self._tensors, f"optimizer/{key}/{name}") for name in names}
            for key, names in about["names"].items()
        }
        rest = unpack(self._about["optimizer rest"], self._tensors, no_flat_state)
        state = OptimizerState.from_json(about, tensors, rest)
        if self._optimizer_state == "new":
            return training.new_optimizer_state
        if self._is_native and state.kind == training.optimizer_state().kind:
            training.check_optimizer_state(state)
            return lambda: training.store_optimizer_state(state)
        if state.is_empty:
            return training.new_optimizer_state
        neutral = self._renamed(state.neutral())
        training.check_neutral_state(neutral)
        return lambda: training.store_neutral_state(neutral)

    def _renamed(self, state: NeutralState) -> NeutralState:
        mapped = {rule.source for rule in self._rules}
        if unknown := sorted({name for by_name in state.quantities.values() for name in by_name} - mapped):
            raise CheckpointError(f"the saved optimizer state is of parameters that are not mapped: {unknown[:5]}")
        quantities = {quantity: self._mapped_state(by_name) for quantity, by_name in state.quantities.items()}
        return NeutralState(state.kind, state.rule, quantities, state.steps)

    def _mapped_state(self, by_name: Mapping[str, Array]) -> dict[str, Array]:
        """One quantity that the optimizer keeps, by the names here."""
        saved = {entry.name: entry for entry in self._saved}

        def value(source: str) -> Array:
            if source in by_name:
                return by_name[source]
            return np.zeros(saved[source].shape, numpy_dtype(saved[source].dtype))  # it has not had a gradient

        return {
            target: self._mapping.value(target, value, of_gradients=True)
            for target, rules in self._mapping.by_target.items()
            if any(rule.source in by_name for rule in rules)
        }
