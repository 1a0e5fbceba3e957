"""Where checkpoints lie, and how one becomes visible: all at once.

A checkpoint is a folder whose manifest, ``checkpoint.json``, names its other files. The manifest is renamed into place
when all of them are on the disk, and until then an earlier manifest names the earlier files. A folder may instead hold
one such folder for each saved step, ``step-00000480``; the newest complete one is the one that is loaded.
"""

import logging
import os
import re
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from hashlib import blake2b
from os import PathLike, fspath
from pathlib import Path
from secrets import token_hex

from lentando.comm.errors import CheckpointError, ConfigurationError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "PART",
    "begin",
    "checked_path",
    "checksum",
    "discard",
    "keep_last",
    "locate",
    "remove_leftovers",
    "written",
]

_log = logging.getLogger("lentando")

FORMAT = "lentando checkpoint"
MANIFEST = "checkpoint.json"
STEP = re.compile(r"step-(\d{8,})")
PART = re.compile(r"step-\d{8,}-[0-9a-f]{8,}-(\d{2,}-)?(rank-\d{5,}|shared)\.safetensors")
"""Names of the files of a checkpoint beside its manifest."""
LEFTOVER = re.compile(rf"({PART.pattern}|{re.escape(MANIFEST)})(\.[0-9a-f]+)?\.partial")
"""Names of files that were being written when a job was killed."""
READ_BYTES = 1024 * 1024


def checked_path(path: str | PathLike[str]) -> Path:
    """The path of a checkpoint as the user gave it.

    Raises:
        ConfigurationError: if it names nothing.
    """
    if not fspath(path).strip():
        raise ConfigurationError("the path of a checkpoint must name a folder, got an empty one ('.' is this folder)")
    return Path(path)


def begin(path: Path, inner_steps: int, keep: int | None) -> Path:
    """The folder, made if need be, of the checkpoint of this step: ``path``, or one in it if several are kept there.

    Raises:
        CheckpointError: if ``path`` is used in the other way already, or holds later steps.
    """
    if keep is None:
        if path.is_dir() and _complete(path):
            raise CheckpointError(f"{path} holds checkpoints by step: save there with keep=, or choose another folder")
        path.mkdir(parents=True, exist_ok=True)
        return path
    if (path / MANIFEST).exists():
        raise CheckpointError(
            f"{path} is a checkpoint itself: choose another folder to keep several, or leave out keep="
        )
    folder = path / f"step-{inner_steps:08d}"
    folder.mkdir(parents=True, exist_ok=True)
    if _complete(path)[-1:] > [folder]:
        raise CheckpointError(
            f"{path} holds {_complete(path)[-1].name}, later than this run's step {inner_steps}, and would be loaded "
            "instead of it: move the later checkpoints away, or save elsewhere"
        )
    return folder


def locate(path: Path) -> Path:
    """The checkpoint that ``path`` means: itself, or the newest complete one in it.

    Raises:
        CheckpointError: if there is none.
    """
    if (path / MANIFEST).exists():
        return path
    steps = _complete(path) if path.is_dir() else []
    if not steps:
        found = "a folder without one" if path.is_dir() else "a file" if path.exists() else "nothing"
        raise CheckpointError(f"expected a checkpoint (a folder with a {MANIFEST}) at {path}, found {found}")
    return steps[-1]


@contextmanager
def written(file: Path) -> Iterator[Path]:
    """Yields a temporary path; when the block is done, what was written there is on the disk, as ``file``.

    The temporary file is new, with a name that cannot be guessed, so that nobody can put a link in its place. What
    exists under the name ``file`` is replaced, and not written through if it is a link.
    """
    partial = file.with_name(f"{file.name}.{token_hex(8)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        # The user's umask has decided who may read it. safetensors puts a file in its place that others cannot read.
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield partial
        with partial.open("rb+") as open_file:
            os.fchmod(open_file.fileno(), mode)
            os.fsync(open_file.fileno())
        partial.replace(file)
        sync_folder(file.parent)
    except BaseException:
        with suppress(OSError):  # what went wrong is the first error
            partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Make the names in a folder as durable as the files."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(file: Path) -> str:
    """Of what the file holds now."""
    digest = blake2b(digest_size=16)
    with file.open("rb") as open_file:
        while data := open_file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def remove_leftovers(folder: Path, files: Iterable[str]) -> None:
    """Remove what earlier checkpoints, and jobs that were killed while they saved, have left in a folder.

    Args:
        folder: of a checkpoint. No other job saves there now.
        files: names of the files that stay. Files that no checkpoint consists of stay anyway.
    """
    kept = set(files)
    for file in sorted(folder.iterdir()):
        if (PART.fullmatch(file.name) and file.name not in kept) or LEFTOVER.fullmatch(file.name):
            file.unlink()


def discard(folder: Path, files: Iterable[str]) -> None:
    """Remove files of a checkpoint that could not be completed. Those that cannot be removed are logged."""
    for name in files:
        _discard(folder / name)


def _discard(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("a file of a checkpoint that is not needed stays behind: %s", error)


def keep_last(path: Path, keep: int, exclusive: bool) -> None:
    """Remove all but the newest ``keep`` checkpoints of a folder.

    Args:
        path: the folder of checkpoints by step.
        keep: how many stay, at least 1.
        exclusive: no other job saves there now, so that folders without a manifest are what killed jobs have left,
            and are removed too.
    """
    complete = _complete(path)
    removable = {*complete[:-keep]}
    if exclusive:
        removable |= {child for child in path.iterdir() if STEP.fullmatch(child.name) and child.is_dir()}
    for folder in sorted(removable - {*complete[-keep:]}):
        (folder / MANIFEST).unlink(missing_ok=True)  # first: without it, the rest is no checkpoint
        remove_leftovers(folder, ())
        if not any(folder.iterdir()):
            folder.rmdir()


def _complete(path: Path) -> list[Path]:
    """The checkpoints in a folder of many, oldest step first."""
    steps = {int(found[1]): child for child in path.iterdir() if (found := STEP.fullmatch(child.name))}
    return [steps[step] for step in sorted(steps) if (steps[step] / MANIFEST).exists()]
