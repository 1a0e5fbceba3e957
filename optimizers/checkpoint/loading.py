"""Loading: each rank reads and checks everything first; the trainings change only if no rank has failed."""

import logging
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, get_args

from lentando.comm.agreement import Event
from lentando.comm.elastic import transaction
from lentando.comm.errors import CheckpointError, ConfigurationError
from lentando.comm.long_work import announced_if_long
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
    """Resume from a checkpoint: bit-identically, if as many ranks of the same framework have saved it.

    Collective: every rank calls it, eagerly, between steps. The model is filled in place. The learning rates and other
    settings of the base optimizer are restored with its state, except from a checkpoint of another framework. The
    framework's random generators resume if as many ranks of the same framework have saved them, and are otherwise left
    unchanged.

    Another number of ranks resumes from the average of the saved replicas, with the outer step's state as it was. One
    warning lists what is exact and what is approximated.

    Args:
        path: as for ``save``: a checkpoint, or a folder of several, of which the newest is loaded.
        optimizer: ``DistributedOptimizer`` for the same model with the same settings, which must be built in
            TensorFlow; for a checkpoint of several, a dict of all of them by the names that ``save`` was given.
        mapping: map from the tensors of the checkpoint to those of the model, where their names differ. A checkpoint of
            another framework needs none if both optimizers were given ``model=``. For several optimizers, a dict of
            maps by name.
        optimizer_state: "saved" restores the base optimizer's state, "new" starts with a new one.

    Returns:
        ``extra`` as the rank of the same number saved it, or else as rank 0 did; in TensorFlow, with arrays in place of
        tensors.

    Raises:
        CheckpointError: on every rank, with the reason, if one of them cannot resume from the checkpoint; nothing has
            changed then.
        ConfigurationError: for invalid arguments.
        MismatchError: on every rank, if the ranks are not at the same step.

    Example:
        >>> import torch, lentando.torch as lt
        >>> lt.init()
        >>> def new_run():
        ...     model = torch.nn.Linear(2, 1)
        ...     return model, lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=12)
        >>> model, optimizer = new_run()
        >>> folder = lt.save("run", optimizer, extra={"epoch": 3})
        >>> resumed, optimizer = new_run()
        >>> lt.load("run", optimizer)
        {'epoch': 3}
        >>> torch.equal(model.weight, resumed.weight)
        True
        >>> lt.shutdown()
    """
    trainings = trainings_of(optimizer)
    if optimizer_state not in get_args(OptimizerStateChoice):
        raise ConfigurationError(f"optimizer_state must be 'saved' or 'new', got {optimizer_state!r}")
    by_name = _mappings_of(mapping, trainings)
    folder = folders.checked_path(path)
    first = next(iter(trainings.values()))
    transport = first.replica.transport
    with announced_if_long(f"loading the checkpoint in {folder}", transport.rank):
        resumed = transaction(transport, lambda: _load(trainings, folder, by_name, optimizer_state))
    return first.from_plain(resumed)


def _mappings_of(
    mapping: WeightMap | Mapping[str, WeightMap] | None, trainings: Mapping[str, Training]
) -> dict[str, WeightMap | None]:
    """The map of each optimizer, by name; None for those without."""
    if mapping is None or (isinstance(mapping, WeightMap) and list(trainings) == [""]):
        return dict.fromkeys(trainings, mapping)
    if list(trainings) == [""]:
        raise ConfigurationError(f"mapping must be a WeightMap, got {type(mapping).__name__}")
    if not isinstance(mapping, Mapping) or not mapping.keys() <= trainings.keys():
        raise ConfigurationError(
            f"mapping must be a dict of WeightMaps by the names of the optimizers, {list(trainings)}, got {mapping!r}"
        )
    for name, weights in mapping.items():
        if not isinstance(weights, WeightMap):
            raise ConfigurationError(f"mapping[{name!r}] must be a WeightMap, got {type(weights).__name__}")
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
        raise CheckpointError(f"it is of one optimizer alone: pass that, in place of a dict of {here}")
    expected = "{" + ", ".join(f"{name!r}: ..." for name in sorted(saved)) + "}"
    given = "one optimizer alone" if here == [""] else f"a dict of {here}"
    raise CheckpointError(f"it is of several optimizers: expected a dict of all of them, {expected}, got {given}")
