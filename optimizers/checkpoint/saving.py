"""Saving: each rank writes its own file, rank 0 what all share, and the manifest once all have written."""

import logging
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from os import PathLike
from pathlib import Path
from secrets import token_hex
from typing import Any, TypeVar

from lentando.comm.agreement import Event
from lentando.comm.elastic import transaction
from lentando.comm.errors import CheckpointError, ConfigurationError, RankLostError, grouped_by_rank
from lentando.comm.long_work import announced_if_long
from lentando.comm.numbering import numbers_of
from lentando.optimizers.checkpoint import folder as folders
from lentando.optimizers.checkpoint.collective import run_on_all_ranks
from lentando.optimizers.checkpoint.lock import locked
from lentando.optimizers.checkpoint.manifest import files_of, read_manifest, write_manifest
from lentando.optimizers.checkpoint.rank_content import RankContent
from lentando.optimizers.checkpoint.shard_file import ShardFile, write_shard_file
from lentando.optimizers.checkpoint.snapshot import equal_on_all_ranks, manifest_content, snapshot
from lentando.optimizers.checkpoint.training import Checkpointed, Training, trainings_of

__all__ = ["save"]

T = TypeVar("T")

Described = list[list[dict[str, Any]]]
"""The files of one rank as the manifest describes them: by optimizer, its own file, and the shared one of rank 0."""

_log = logging.getLogger("lentando")


def save(
    path: str | PathLike[str],
    optimizer: Checkpointed | Mapping[str, Checkpointed],
    extra: Any = None,
    *,
    keep: int | None = None,
) -> Path:
    """Save a checkpoint: the model, the base optimizer and all other state, from which any framework can resume.

    Collective: every rank calls it, eagerly, between steps. A checkpoint appears when it is complete; until then, an
    earlier one at the same place remains unchanged. The framework's random generators, from which dropout draws, are
    saved as well (of Keras, the seed generators of a model passed as ``model=``). Those of Python and NumPy are not:
    pass their states as ``extra``. If the optimizer was given ``model=``, another framework can identify its tensors
    without a map.

    Args:
        path: folder that all ranks see, which is created if necessary. One job at a time saves there.
        optimizer: ``DistributedOptimizer``, which must be built in TensorFlow; or a dict of several by name, such as
            ``{"generator": g, "discriminator": d}``, which are saved as one checkpoint.
        extra: anything else that this rank needs when it resumes (epoch, scheduler, random generators): None, numbers,
            strings, bytes, paths, arrays and tensors, in lists, tuples, sets and dicts (``OrderedDict``, ``Counter``,
            ``defaultdict`` of a built-in type), which keep their kind.
        keep: number of checkpoints to keep. ``path`` is then a folder of checkpoints by step, ``step-00000480`` and so
            on. Without it, ``path`` is a single checkpoint, which is replaced. Of several optimizers, the largest count
            of steps names the folder.

    Returns:
        The folder of this checkpoint.

    Raises:
        CheckpointError: on every rank, if one of them fails (disk full, another job saves there, ...); an earlier
            checkpoint remains.
        ConfigurationError: for invalid arguments.
        MismatchError: on every rank, if the ranks are not at the same step.

    Example:
        >>> import torch, lentando.torch as lt
        >>> lt.init()
        >>> model = torch.nn.Linear(2, 1)
        >>> optimizer = lt.SlowMo(torch.optim.SGD(model.parameters(), lr=0.1), model=model, period=12)
        >>> model(torch.ones(8, 2)).square().mean().backward()
        >>> optimizer.step()
        >>> lt.save("run", optimizer, extra={"epoch": 3}, keep=2).name
        'step-00000001'
        >>> lt.shutdown()
    """
    trainings = trainings_of(optimizer)
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 1):
        raise ConfigurationError(f"keep must be an integer >= 1 (checkpoints), or None for one alone, got {keep!r}")
    folder = folders.checked_path(path)
    transport = next(iter(trainings.values())).replica.transport
    # A new object for each attempt: after ranks have died, another one may be rank 0.
    with announced_if_long(f"saving a checkpoint to {folder}", transport.rank):
        return transaction(transport, lambda: _Saving(trainings, folder, keep).save(extra))


class _Saving:
    """One checkpoint that is being saved. Its methods are collective: all ranks call them.

    Args:
        trainings: what is saved, by name; the same names in the same order on all ranks.
        path: as for ``save``.
        keep: as for ``save``.
    """

    def __init__(self, trainings: dict[str, Training], path: Path, keep: int | None) -> None:
        self._trainings = trainings
        self._path = path
        self._keep = keep
        self._transport = next(iter(trainings.values())).replica.transport
        self._is_first = self._transport.rank == 0
        self._lock = ExitStack()

    def save(self, extra: Any) -> Path:
        """Save the checkpoint, and return its folder."""
        for training in self._trainings.values():
            training.replica.meet(Event.SAVE)
        self._check_alike()
        contents = self._snapshots(extra)
        shared = {name: equal_on_all_ranks(self._transport, contents[name].tensors) for name in self._trainings}
        with self._lock:
            folder, attempt, is_exclusive = self._begin()
            by_rank = self._write(folder, attempt, contents, shared)
            self._commit(folder, by_rank, is_exclusive)
        return folder

    def _on_all_ranks(self, action: Callable[[], T], folder: Path | None = None) -> list[T]:
        place = "" if folder is None else f" to {folder}"
        return run_on_all_ranks(self._transport, f"saving a checkpoint{place}", action)

    def _check_alike(self) -> None:
        optimizers = "" if list(self._trainings) == [""] else f"the optimizers {list(self._trainings)}, "
        places = self._on_all_ranks(lambda: f"saves {optimizers}to {self._path}, keep={self._keep}")
        if len(set(places)) > 1:
            by_rank = grouped_by_rank(places, numbers_of(self._transport))
            raise CheckpointError(f"the ranks save to different places: {by_rank}")

    def _snapshots(self, extra: Any) -> dict[str, RankContent]:
        """What this rank saves, by name. ``extra`` is saved with the first."""
        contents: dict[str, RankContent] = {}

        def collect() -> None:
            for number, (name, training) in enumerate(self._trainings.items()):
                contents[name] = snapshot(training, extra if number == 0 else None)

        self._on_all_ranks(collect)
        return contents

    def _begin(self) -> tuple[Path, str, bool]:
        """The folder, the beginning of its files' names, and whether a lock keeps other jobs from saving there."""
        steps = max(training.replica.inner_steps for training in self._trainings.values())

        def begin() -> list[Any]:
            if not self._is_first:
                return []
            self._path.mkdir(parents=True, exist_ok=True)
            is_exclusive = self._lock.enter_context(locked(self._path))
            folder = folders.begin(self._path, steps, self._keep)
            return [str(folder), f"step-{steps:08d}-{token_hex(8)}", is_exclusive]

        folder, attempt, is_exclusive = self._on_all_ranks(begin, self._path)[0]
        return Path(folder), attempt, is_exclusive

    def _write(
        self, folder: Path, attempt: str, contents: dict[str, RankContent], shared: dict[str, set[str]]
    ) -> list[Described]:
        """Write this rank's files. Returns the descriptions of all ranks' files, by rank."""
        names_written: list[str] = []

        def write() -> Described:
            described = []
            for number, name in enumerate(self._trainings):
                stem = attempt if name == "" else f"{attempt}-{number:02d}"
                tensors, about = contents[name]
                own = {key: array for key, array in tensors.items() if key not in shared[name]}
                files = [(f"{stem}-rank-{self._transport.rank:05d}.safetensors", own, about)]
                if self._is_first:
                    files.append((f"{stem}-shared.safetensors", {key: tensors[key] for key in shared[name]}, None))
                names_written.extend(file for file, _, _ in files)
                described.append([write_shard_file(folder / file, *content).as_json() for file, *content in files])
            return described

        def check() -> None:
            if self._is_first:
                _check_visible(folder, by_rank)

        try:
            by_rank = self._on_all_ranks(write, folder)
            self._on_all_ranks(check, folder)
        except (CheckpointError, RankLostError):
            folders.discard(folder, names_written)
            raise
        return by_rank

    def _commit(self, folder: Path, by_rank: list[Described], is_exclusive: bool) -> None:
        """Rank 0 writes the manifest, which makes the checkpoint visible."""

        def commit() -> None:
            if self._is_first:
                with self._lock:  # released before the other ranks continue
                    self._publish(folder, by_rank, is_exclusive)

        self._on_all_ranks(commit, folder)

    def _publish(self, folder: Path, by_rank: list[Described], is_exclusive: bool) -> None:
        contents = {}
        for number, (name, training) in enumerate(self._trainings.items()):
            files = [described[number] for described in by_rank]
            parts = {"ranks": [own for own, *_ in files], "shared": files[0][1]}
            contents[name] = {**manifest_content(training), "parts": parts}
        replaced = [] if is_exclusive else _files_in(folder)
        try:
            write_manifest(folder, contents)
        except BaseException:
            if set(_files_in(folder)).isdisjoint(files_of(contents)):  # it may be in place, but not yet on the disk
                folders.discard(folder, files_of(contents))
            raise
        self._remove_replaced(folder, files_of(contents), is_exclusive, replaced)

    def _remove_replaced(self, folder: Path, files: list[str], is_exclusive: bool, replaced: list[str]) -> None:
        """Remove what the checkpoint has replaced. If that fails, the checkpoint is saved all the same."""
        try:
            if is_exclusive:
                folders.remove_leftovers(folder, files)
            else:
                folders.discard(folder, replaced)
            if self._keep is not None:
                folders.keep_last(self._path, self._keep, is_exclusive)
        except OSError as error:
            _log.warning("the checkpoint in %s is complete, but an earlier one could not be removed: %s", folder, error)


def _files_in(folder: Path) -> list[str]:
    """The files of the checkpoint that a folder holds now, none if it holds none that can be read."""
    try:
        return files_of(read_manifest(folder))
    except (CheckpointError, OSError):
        return []


def _check_visible(folder: Path, by_rank: list[Described]) -> None:
    """Check on rank 0 that it sees the files that the other ranks have written."""
    for rank, by_optimizer in enumerate(by_rank):
        for shard in (ShardFile(**described) for files in by_optimizer for described in files):
            file = folder / shard.file
            size_bytes = file.stat().st_size if file.exists() else "no"
            if size_bytes != shard.size_bytes:
                raise CheckpointError(
                    f"rank {rank} wrote {shard.size_bytes} bytes to {file}, but rank 0 sees {size_bytes} bytes there: "
                    "checkpoints need a file system that all ranks share"
                )
