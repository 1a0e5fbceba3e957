"""Loading: every rank reads and checks all that it needs; only when no rank objects is anything changed."""

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from lentando.comm.agreement import Event
from lentando.comm.elastic import transaction
from lentando.comm.errors import CheckpointError, ConfigurationError
from lentando.comm.objects import broadcast_object
from lentando.optimizers.checkpoint import folder as folders
from lentando.optimizers.checkpoint.collective import run_on_all_ranks
from lentando.optimizers.checkpoint.manifest import read_manifest
from lentando.optimizers.checkpoint.rank_content import SavedRanks
from lentando.optimizers.checkpoint.restoring import OptimizerStateChoice, Restoration, prepare
from lentando.optimizers.checkpoint.source import Source, read_source
from lentando.optimizers.checkpoint.training import Checkpointed, Training, trainings_of
from lentando.optimizers.checkpoint.weight_map import WeightMap

__all__ = ["OptimizerStateChoice", "load"]

_log = logging.getLogger("lentando")


def load(
    path: str | PathLike[str],
    optimizer: Checkpointed | Mapping[str, Checkpointed],
    mapping: WeightMap | Mapping[str, WeightMap] | None = None,
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
    folder = folders.checked_path(path)
    first = next(iter(trainings.values()))
    resumed = transaction(first.replica.transport, lambda: _load(trainings, folder, by_name, optimizer_state))
    return first.from_plain(resumed)


def _mappings_of(
    mapping: WeightMap | Mapping[str, WeightMap] | None, trainings: Mapping[str, Training]
) -> dict[str, WeightMap | None]:
    """The mapping of each optimizer, None for those without."""
    if mapping is None or (isinstance(mapping, WeightMap) and list(trainings) == [""]):
        return dict.fromkeys(trainings, mapping)
    if list(trainings) == [""]:
        raise ConfigurationError(f"mapping must be a WeightMap, got {type(mapping).__name__}")
    if not isinstance(mapping, Mapping) or not mapping.keys() <= trainings.keys():
        raise ConfigurationError(
            f"mapping must be a dict of WeightMaps by the names of the optimizers, {list(trainings)}, got {mapping!r}"
        )
    for name, own in mapping.items():
        if not isinstance(own, WeightMap):
            raise ConfigurationError(f"mapping[{name!r}] must be a WeightMap, got {type(own).__name__}")
    return {name: mapping.get(name) for name in trainings}


def _load(
    trainings: Mapping[str, Training],
    path: Path,
    by_name: Mapping[str, WeightMap | None],
    optimizer_state: OptimizerStateChoice,
) -> Any:
    transport = next(iter(trainings.values())).replica.transport
    for training in trainings.values():
        training.replica.meet(Event.LOAD)
    located: dict[str, Any] = {}

    def locate() -> None:
        if transport.rank == 0:
            folder = folders.locate(path)
            located.update(folder=str(folder), contents=read_manifest(folder))

    run_on_all_ranks(transport, f"loading the checkpoint {path}", locate)
    located = broadcast_object(transport, located)
    folder, contents = Path(located["folder"]), located["contents"]
    sources: list[Source] = []
    restorations: list[Restoration] = []

    def read_and_check() -> None:
        _check_names(list(contents), list(trainings))
        for name, training in trainings.items():
            source = read_source(SavedRanks(folder, contents[name]), training.replica)
            sources.append(source)
            restorations.append(prepare(source, training, by_name[name], optimizer_state))

    def adopt() -> None:
        for restoration in restorations:
            restoration.adopt()

    doing = f"loading the checkpoint {folder}"
    run_on_all_ranks(transport, doing, read_and_check)
    run_on_all_ranks(transport, doing, adopt)
    for restoration, name in zip(restorations, trainings, strict=True):
        for warning in restoration.warnings if transport.rank == 0 else []:
            _log.warning("%s%s", f"{name}: " if name else "", warning)
    return sources[0].extra


def _check_names(saved: list[str], here: list[str]) -> None:
    if sorted(saved) == here:
        return
    if saved == [""]:
        raise CheckpointError(f"it is of one optimizer alone: give that, in place of a dict of {here}")
    wanted = "{" + ", ".join(f"{name!r}: ..." for name in sorted(saved)) + "}"
    found = "one optimizer alone" if here == [""] else f"a dict of {here}"
    raise CheckpointError(f"it is of several optimizers: expected a dict of all of them, {wanted}, got {found}")
