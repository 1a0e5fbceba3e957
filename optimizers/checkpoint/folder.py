"""Folders of checkpoints, and how a checkpoint becomes visible: all at once.

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
"""Names of the files of a checkpoint, other than its manifest."""
LEFTOVER = re.compile(rf"({PART.pattern}|{re.escape(MANIFEST)})(\.[0-9a-f]+)?\.partial")
"""Names of files that were being written when a job was killed."""
READ_BYTES = 1024 * 1024


def checked_path(path: str | PathLike[str]) -> Path:
    """The path of a checkpoint as a ``Path``.

    Raises:
        ConfigurationError: if the path is empty.
    """
    if not fspath(path).strip():
        raise ConfigurationError("the path of a checkpoint must name a folder, got an empty one ('.' is this folder)")
    return Path(path)


def begin(path: Path, inner_steps: int, keep: int | None) -> Path:
    """The folder for the checkpoint of this step, which is created: ``path``, or a folder in it if several are kept.

    Args:
        path: as given to ``save``.
        inner_steps: inner steps taken.
        keep: number of checkpoints by step that are kept in ``path``, None if ``path`` is a single checkpoint.

    Raises:
        CheckpointError: if ``path`` already holds the other kind of checkpoint, or later steps.
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
    """The folder of a checkpoint: ``path`` itself, or the newest complete checkpoint in it.

    Raises:
        CheckpointError: if ``path`` holds no complete checkpoint.
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
    """Write a file atomically: yields a temporary path, which is synced and renamed to ``file`` when the block ends.

    The temporary file is new, with a name that cannot be guessed, so that no other user can put a link in its place. An
    existing ``file`` is replaced; if it is a link, its target is not written to.
    """
    partial = file.with_name(f"{file.name}.{token_hex(8)}.partial")
    descriptor = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        # The mode follows from the user's umask. safetensors replaces the file by one that only its owner may read.
        mode = stat.S_IMODE(os.fstat(descriptor).st_mode)
        os.close(descriptor)
        yield partial
        with partial.open("rb+") as open_file:
            os.fchmod(open_file.fileno(), mode)
            os.fsync(open_file.fileno())
        partial.replace(file)
        sync_folder(file.parent)
    except BaseException:
        with suppress(OSError):  # the first error is the one to report
            partial.unlink(missing_ok=True)
        raise


def sync_folder(folder: Path) -> None:
    """Write the directory entries of a folder to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def checksum(file: Path) -> str:
    """Checksum of a file's content: 32 hexadecimal digits of BLAKE2b."""
    digest = blake2b(digest_size=16)
    with file.open("rb") as open_file:
        while data := open_file.read(READ_BYTES):
            digest.update(data)
    return digest.hexdigest()


def remove_leftovers(folder: Path, files: Iterable[str]) -> None:
    """Remove files of earlier checkpoints, and of jobs that were killed while they saved, from a folder.

    Args:
        folder: folder of a checkpoint, to which no other job is saving.
        files: names of the files to keep. Files that are not named like those of a checkpoint are kept in any case.
    """
    kept = set(files)
    for file in sorted(folder.iterdir()):
        if (PART.fullmatch(file.name) and file.name not in kept) or LEFTOVER.fullmatch(file.name):
            file.unlink()


def discard(folder: Path, files: Iterable[str]) -> None:
    """Remove files of an incomplete or replaced checkpoint. Those that cannot be removed are logged."""
    for name in files:
        _discard(folder / name)


def _discard(file: Path) -> None:
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        _log.warning("a file of a checkpoint that is no longer needed could not be removed: %s", error)


def keep_last(path: Path, keep: int, exclusive: bool) -> None:
    """Remove all but the newest ``keep`` checkpoints of a folder.

    Args:
        path: folder of checkpoints by step.
        keep: number of checkpoints to keep, at least 1.
        exclusive: whether no other job can be saving there, so that folders without a manifest are leftovers of killed
            jobs, and are removed too.
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
    """The complete checkpoints by step in a folder, oldest first."""
    steps = {int(match[1]): child for child in path.iterdir() if (match := STEP.fullmatch(child.name))}
    return [steps[step] for step in sorted(steps) if (steps[step] / MANIFEST).exists()]
