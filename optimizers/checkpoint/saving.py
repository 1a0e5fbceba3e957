"""Saving: every rank writes what is its own, rank 0 what all share, and the manifest when all have written."""

import logging
from collections.abc import Mapping
from contextlib import ExitStack
from hashlib import blake2b
from os import PathLike, fspath
from pathlib import Path
from secrets import token_hex
from typing import Any

import numpy as np

from lentando.comm.agreement import Event
from lentando.comm.array_module import to_host
from lentando.comm.elastic import transaction
from lentando.comm.errors import CheckpointError, ConfigurationError, RankLostError, grouped_by_rank
from lentando.comm.flat import describe
from lentando.comm.objects import broadcast_object
from lentando.comm.transport import Array, Transport, as_bytes
from lentando.optimizers.checkpoint import folder as folders
from lentando.optimizers.checkpoint.collective import run_on_all_ranks
from lentando.optimizers.checkpoint.elements import in_shape
from lentando.optimizers.checkpoint.lock import locked
from lentando.optimizers.checkpoint.manifest import files_of, read_manifest, write_manifest
from lentando.optimizers.checkpoint.shard_file import ShardFile, write_shard_file
from lentando.optimizers.checkpoint.training import Checkpointed, Training, trainings_of
from lentando.optimizers.checkpoint.tree import pack

__all__ = ["checked_path", "save"]

_log = logging.getLogger("lentando")


def save(
    path: str | PathLike[str],
    optimizer: Checkpointed | Mapping[str, Checkpointed],
    extra: Any = None,
    *,
    keep: int | None = None,
) -> Path:
    """Save model, base optimizer and all that decides the next step of every rank, for any framework to continue from.

    Collective: every rank calls it, eagerly, between steps. A checkpoint appears when it is complete; until then, an
    earlier one at the same place stays what it was. The framework's own random generators, from which dropout draws,
    are saved with it (of Keras, the seed generators of a model given as ``model=``); those of Python and NumPy are not:
    give their states as ``extra``. With ``model=`` given to the optimizer, another framework can find out by itself
    which of its tensors is which parameter.

    Args:
        path: a folder that all ranks see; made if need be. One job at a time saves there.
        optimizer: a ``DistributedOptimizer``; in TensorFlow, built. Or a dict of several by name, such as
            ``{"generator": g, "discriminator": d}``, which are saved as one checkpoint.
        extra: whatever else this rank wants back (epoch, scheduler, random generators): None, numbers, strings,
            bytes, paths, arrays and tensors, in lists, tuples, sets and dicts (``OrderedDict``, ``Counter``,
            ``defaultdict`` of a built-in type), which keep their kind.
        keep: makes ``path`` a folder of checkpoints by step, ``step-00000480`` and so on, of which the newest so many
            are kept. Without it ``path`` is one checkpoint, which is replaced. Of several optimizers, the largest
            count of steps names the folder.

    Returns:
        The folder of this checkpoint.

    Raises:
        CheckpointError: on every rank, if one of them fails (disk full, another job saves there, ...); what was there
            before is still there.
        ConfigurationError: for arguments that cannot work.
        MismatchError: on every rank, if the ranks are not at the same step.
    """
    trainings = trainings_of(optimizer)
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
        raise ConfigurationError(f"keep must be an integer >= 1 (checkpoints), or None for one alone, got {keep!r}")
    folder = checked_path(path)
    first = next(iter(trainings.values()))
    return transaction(first.replica.transport, lambda: _Saving(trainings, folder, keep).save(extra))


def checked_path(path: str | PathLike[str]) -> Path:
    """The path of a checkpoint as the user gave it.

    Raises:
        ConfigurationError: if it names nothing.
    """
    if not fspath(path).strip():
        raise ConfigurationError("the path of a checkpoint must name a folder, got an empty one ('.' is this folder)")
    return Path(path)


class _Saving:
    """One checkpoint that is being saved. Its methods are called by all ranks together.

    Args:
        trainings: what is saved, by name; the same names in the same order on all ranks.
        path, keep: as for ``save``.
    """

    def __init__(self, trainings: dict[str, Training], path: Path, keep: int | None) -> None:
        self._trainings = trainings
        self._path = path
        self._keep = keep
        self._transport: Transport = next(iter(trainings.values())).replica.transport
        self._is_first = self._transport.rank == 0
        self._lock = ExitStack()

    def save(self, extra: Any) -> Path:
        for training in self._trainings.values():
            training.replica.meet(Event.SAVE)
        self._check_alike()
        mine = self._collected(extra)
        shared = {name: _equal_on_all_ranks(self._transport, mine[name]["tensors"]) for name in self._trainings}
        with self._lock:
            folder, attempt, exclusive = self._begin()
            parts = self._write(folder, attempt, mine, shared)
            self._commit(folder, parts, exclusive)
        return folder

    def _together(self, action: Any, where: Path | None = None) -> list[Any]:
        place = "" if where is None else f" to {where}"
        return run_on_all_ranks(self._transport, f"saving a checkpoint{place}", action)

    def _check_alike(self) -> None:
        what = "" if list(self._trainings) == [""] else f"the optimizers {list(self._trainings)}, "
        places = self._together(lambda: f"saves {what}to {self._path}, keep={self._keep}")
        if len(set(places)) > 1:
            raise CheckpointError(f"the ranks save to different places: {grouped_by_rank(places)}")

    def _collected(self, extra: Any) -> dict[str, dict[str, Any]]:
        """By name, this rank's tensors, and JSON about them. ``extra`` is kept with the first."""
        mine: dict[str, dict[str, Any]] = {}

        def collect() -> None:
            for number, (name, training) in enumerate(self._trainings.items()):
                mine[name] = _collected(training, extra if number == 0 else None)

        self._together(collect)
        return mine

    def _begin(self) -> tuple[Path, str, bool]:
        """The folder, what the names of its files begin with, and whether no other job can save there meanwhile."""
        steps = max(training.replica.inner_steps for training in self._trainings.values())

        def begin() -> list[Any]:
            if not self._is_first:
                return []
            self._path.mkdir(parents=True, exist_ok=True)
            exclusive = self._lock.enter_context(locked(self._path))
            folder = folders.begin(self._path, steps, self._keep)
            return [str(folder), f"step-{steps:08d}-{token_hex(8)}", exclusive]

        place, attempt, exclusive = self._together(begin, self._path)[0]
        return Path(place), attempt, exclusive

    def _write(
        self, folder: Path, attempt: str, mine: dict[str, dict[str, Any]], shared: dict[str, set[str]]
    ) -> list[list[list[dict[str, Any]]]]:
        """Write this rank's files. Returns what the manifest says of them, by rank, then by optimizer."""
        own_files: list[str] = []

        def write() -> list[list[dict[str, Any]]]:
            described = []
            for number, name in enumerate(self._trainings):
                stem = attempt if name == "" else f"{attempt}-{number:02d}"
                tensors, common = mine[name]["tensors"], shared[name]
                own = {key: array for key, array in tensors.items() if key not in common}
                wanted = [(f"{stem}-rank-{self._transport.rank:05d}.safetensors", own, mine[name]["about"])]
                if self._is_first:
                    wanted.append((f"{stem}-shared.safetensors", {key: tensors[key] for key in common}, None))
                own_files.extend(file for file, _, _ in wanted)
                described.append([write_shard_file(folder / file, *content).as_json() for file, *content in wanted])
            return described

        def check() -> None:
            if self._is_first:
                _check_visible(folder, parts)

        try:
            parts = self._together(write, folder)
            self._together(check, folder)
        except (CheckpointError, RankLostError):
            folders.discard(folder, own_files)
            raise
        return parts

    def _commit(self, folder: Path, parts: list[list[list[dict[str, Any]]]], exclusive: bool) -> None:
        def commit() -> None:
            if not self._is_first:
                return
            with self._lock:  # released before the other ranks go on
                publish()

        def publish() -> None:
            contents = {}
            for number, (name, training) in enumerate(self._trainings.items()):
                by_rank = [own[number] for own in parts]
                described = {"ranks": [own[0] for own in by_rank], "shared": by_rank[0][1]}
                contents[name] = {**_described(training), "parts": described}
            replaced = [] if exclusive else _names(folder)
            try:
                write_manifest(folder, contents)
            except BaseException:
                if set(_names(folder)).isdisjoint(files_of(contents)):  # it may be in place, though not yet on the disk
                    folders.discard(folder, files_of(contents))
                raise
            self._remove_replaced(folder, files_of(contents), exclusive, replaced)

        self._together(commit, folder)

    def _remove_replaced(self, folder: Path, files: list[str], exclusive: bool, replaced: list[str]) -> None:
        """Remove what the checkpoint has replaced. Not being able to is no failure to save."""
        try:
            if exclusive:
                folders.remove_leftovers(folder, files)
            else:
                folders.discard(folder, replaced)
            if self._keep is not None:
                folders.keep_last(self._path, self._keep, exclusive)
        except OSError as error:
            _log.warning("the checkpoint in %s is complete, but an earlier one could not be removed: %s", folder, error)


def _names(folder: Path) -> list[str]:
    """The files of the checkpoint that is in a folder now, none if there is none that can be read."""
    try:
        return files_of(read_manifest(folder))
    except (CheckpointError, OSError):
        return []


def _collected(training: Training, extra: Any) -> dict[str, Any]:
    """This rank's tensors, and JSON about them."""
    replica = training.replica
    framework = replica.framework
    framework.load()
    layouts = [buffer.layout for buffer in framework.buffers]
    tensors: dict[str, Array] = {}
    for buffer in framework.buffers:
        elements = to_host(buffer.array)
        for entry, start in zip(buffer.layout.entries, buffer.layout.offsets, strict=True):
            tensors[f"model/{entry.name}"] = in_shape(elements[start : start + entry.size], entry)
    for name, array in framework.not_averaged().items():
        tensors[f"model/{name}"] = array
    state = training.optimizer_state()
    for key, by_name in state.tensors.items():
        tensors |= {f"optimizer/{key}/{name}": array for name, array in by_name.items()}
    about: dict[str, Any] = {
        "framework": framework.name,  # ranks of one job may run different ones
        "not_averaged": [[name, list(a.shape), a.dtype.name] for name, a in framework.not_averaged().items()],
    }
    trees = (
        ("replica", {key: item for key, item in replica.state_dict().items() if key != "settings"}),  # in the manifest
        ("optimizer rest", state.rest),
        ("random", training.random_state()),
        ("extra", training.to_plain(extra)),
    )
    for name, tree in trees:
        about[name], found = pack(tree, layouts, name)
        tensors |= found
    about["optimizer"] = {
        **state.about(),
        "names": {key: list(by_name) for key, by_name in state.tensors.items()},
    }
    return {"tensors": tensors, "about": about}


def _described(training: Training) -> dict[str, Any]:
    """What must be known before any tensor is read: the same on all ranks."""
    framework, settings = training.replica.framework, training.replica.settings
    layers, reason = _layers(training)
    return {
        "framework": framework.name,
        "world_size": training.replica.transport.size,
        "inner_steps": training.replica.inner_steps,
        "rounds": training.replica.rounds,
        "settings": settings.method,
        "entries": describe(buffer.layout for buffer in framework.buffers),
        "layers": layers,
        "why_no_layers": reason,
    }


def _layers(training: Training) -> tuple[list[Any] | None, str]:
    """What the model consists of, or why that is not known: no reason not to save, only not to find a mapping."""
    try:
        layers = training.layers()
    except ConfigurationError as error:
        return None, str(error)
    return (None, "no model= was given when it was saved") if layers is None else ([x.as_json() for x in layers], "")


def _equal_on_all_ranks(transport: Transport, tensors: dict[str, Array]) -> set[str]:
    """The tensors that need to be written only once."""
    mine = {name: _digest(array) for name, array in tensors.items()}
    first = broadcast_object(transport, mine)
    equal = np.array([mine.get(name) == digest for name, digest in first.items()], np.uint8)
    everywhere = transport.allgather(equal).min(axis=0)
    return {name for number, name in enumerate(first) if everywhere[number]}


def _digest(array: Array) -> str:
    digest = blake2b(f"{array.dtype.name} {array.shape}".encode(), digest_size=16)
    digest.update(as_bytes(np.ascontiguousarray(array)).data)
    return digest.hexdigest()


def _check_visible(folder: Path, parts: list[list[list[dict[str, Any]]]]) -> None:
    """What the other ranks wrote must be there for rank 0 as well."""
    for rank, own in enumerate(parts):
        for part in (ShardFile(**described) for by_optimizer in own for described in by_optimizer):
            file = folder / part.file
            found = file.stat().st_size if file.exists() else "no"
            if found != part.size_bytes:
                raise CheckpointError(
                    f"rank {rank} wrote {part.size_bytes} bytes to {file}, but rank 0 sees {found} bytes there: "
                    "checkpoints need a file system that all ranks share"
                )
