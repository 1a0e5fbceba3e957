"""Where checkpoints lie, and how one becomes visible: all at once.

A checkpoint is a folder whose manifest, ``checkpoint.json``, names its other files. The manifest is renamed into place
when all of them are on the disk, and until then an earlier manifest names the earlier files. A folder may instead hold
one such folder for each saved step, ``step-00000480``; the newest complete one is the one that is loaded.
"""

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lentando.comm.errors import CheckpointError

__all__ = [
    "FORMAT",
    "MANIFEST",
    "VERSION",
    "begin",
    "checksum",
    "commit",
    "discard",
    "keep_last",
    "locate",
    "read_manifest",
    "tidy",
    "written",
]

FORMAT = "lentando checkpoint"
VERSION = 1
MANIFEST = "checkpoint.json"
STEP = re.compile(r"step-(\d{8,})")
PART = re.compile(r"step-\d{8,}-[0-9a-f]{8}-(rank-\d{5,}|shared)\.safetensors(\.partial)?")
READ_BYTES = 1024 * 1024


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
    """Yields a temporary path; when the block is done, what was written there is on the disk, as ``file``."""
    partial = file.with_name(f"{file.name}.partial")
    try:
        yield partial
        with partial.open("rb+") as open_file:
            os.fsync(open_file.fileno())
        partial.replace(file)
        sync_folder(file.parent)
    finally:
        partial.unlink(missing_ok=True)


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


def commit(folder: Path, content: dict[str, Any]) -> None:
    """Make the checkpoint visible, in place of an earlier one. ``content`` is JSON and names all other files."""
    manifest = {"format": FORMAT, "version": VERSION, "checksum": _checksum_of(content), "content": content}
    with written(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1, allow_nan=False))


def tidy(folder: Path, files: list[str]) -> None:
    """Remove the files of an earlier checkpoint, and what a job that was killed has left behind."""
    for file in sorted(folder.iterdir()):
        if PART.fullmatch(file.name) and file.name not in files:
            file.unlink()


def read_manifest(folder: Path) -> dict[str, Any]:
    """The content of a checkpoint's manifest.

    Raises:
        CheckpointError: if it is damaged, of something else, or of a newer version.
    """
    file = folder / MANIFEST
    try:
        manifest = json.loads(file.read_text())
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged (cut off, or overwritten): it is not JSON ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} was not written by Lentando: expected the format {FORMAT!r}")
    version = manifest.get("version")
    if version != VERSION:
        raise CheckpointError(
            f"{file} is of version {version!r} of the format, this Lentando reads version {VERSION}: load it with the "
            "Lentando that wrote it, or a newer one"
        )
    content = manifest.get("content")
    if not isinstance(content, dict) or manifest.get("checksum") != _checksum_of(content):
        raise CheckpointError(f"{file} is damaged: its checksum is not that of its content")
    return content


def discard(folder: Path, files: list[str]) -> None:
    """Remove files of a checkpoint that did not come about."""
    for name in files:
        (folder / name).unlink(missing_ok=True)


def keep_last(path: Path, keep: int) -> None:
    """Remove all but the newest ``keep`` checkpoints of a folder, and what a job that was killed has left behind."""
    complete = _complete(path)
    for folder in sorted(path.iterdir()):
        if STEP.fullmatch(folder.name) and folder.is_dir() and folder not in complete[-keep:]:
            (folder / MANIFEST).unlink(missing_ok=True)  # first: without it, the rest is no checkpoint
            for file in sorted(folder.iterdir()):
                if PART.fullmatch(file.name) or file.name == f"{MANIFEST}.partial":
                    file.unlink()
            if not any(folder.iterdir()):
                folder.rmdir()


def _complete(path: Path) -> list[Path]:
    """The checkpoints in a folder of many, oldest step first."""
    steps = {int(found[1]): child for child in path.iterdir() if (found := STEP.fullmatch(child.name))}
    return [steps[step] for step in sorted(steps) if (steps[step] / MANIFEST).exists()]


def _checksum_of(content: dict[str, Any]) -> str:
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
