"""The manifest of a checkpoint: its files, and what must be known before any of them is read."""

import json
import re
from collections.abc import Callable
from hashlib import blake2b
from pathlib import Path
from typing import Any

from lentando.comm.errors import CheckpointError
from lentando.optimizers.checkpoint.folder import FORMAT, MANIFEST, PART, written
from lentando.optimizers.checkpoint.old_settings import settings_from_text

__all__ = ["SEVERAL", "VERSION", "files_of", "parse_json", "read_manifest", "write_manifest"]

VERSION = 3
"""Version of the manifest of one optimizer, whose content is ``Content``."""
SEVERAL = 4
"""Version of the manifest of several optimizers, whose content is ``{"optimizers": {name: Content}}``."""
OLD, SEVERAL_OLD = 1, 2
"""Earlier versions of these two, in which the settings are text."""

Content = dict[str, Any]
CHECKSUM = re.compile(r"[0-9a-f]{32}")


def write_manifest(folder: Path, contents: dict[str, Content]) -> None:
    """Make a checkpoint visible, in place of an earlier one, once all of its other files are on the disk.

    Args:
        folder: folder of the checkpoint.
        contents: JSON for each optimizer, which names all other files, by the optimizer's name, which is empty for a
            single one.
    """
    several = list(contents) != [""]
    content: dict[str, Any] = {"optimizers": contents} if several else contents[""]
    manifest = {
        "format": FORMAT,
        "version": SEVERAL if several else VERSION,
        "checksum": _checksum_of(content),
        "content": content,
    }
    with written(folder / MANIFEST) as partial:
        partial.write_text(json.dumps(manifest, indent=1, allow_nan=False))


def read_manifest(folder: Path) -> dict[str, Content]:
    """The contents of a checkpoint's manifest by the optimizer's name, which is empty for a single one.

    Raises:
        CheckpointError: if it is damaged, was not written by Lentando, or is of a newer version.
    """
    file = folder / MANIFEST
    manifest = parse_json(file.read_bytes(), str(file))
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise CheckpointError(f"{file} was not written by Lentando: expected the format {FORMAT!r}")
    version = manifest.get("version")
    if version not in (OLD, SEVERAL_OLD, VERSION, SEVERAL) or isinstance(version, bool):
        raise CheckpointError(
            f"{file} is of version {version!r} of the format, this Lentando reads versions {OLD} to {SEVERAL}: "
            "load it with the Lentando that wrote it, or a newer one"
        )
    content = manifest.get("content")
    if not isinstance(content, dict) or manifest.get("checksum") != _checksum_of(content):
        raise CheckpointError(f"{file} is damaged: its checksum is not that of its content")
    contents = content.get("optimizers") if version in (SEVERAL, SEVERAL_OLD) else {"": content}
    if not isinstance(contents, dict) or not contents:
        raise CheckpointError(f"{file} is damaged: it names no optimizer")
    settings = str if version in (OLD, SEVERAL_OLD) else dict
    for name, own in contents.items():
        _check(own, settings, str(file) if contents.keys() == {""} else f"{file}, optimizer {name!r},")
    files = files_of(contents)
    if len(set(files)) < len(files):
        twice = next(name for name in files if files.count(name) > 1)
        raise CheckpointError(f"{file} is damaged: it names {twice!r} twice")
    if version in (OLD, SEVERAL_OLD):
        return {name: {**own, "settings": settings_from_text(own["settings"])} for name, own in contents.items()}
    return contents


def files_of(contents: dict[str, Content]) -> list[str]:
    """The names of all other files of a checkpoint."""
    return [
        part["file"]
        for content in contents.values()
        for part in (*content["parts"]["ranks"], content["parts"]["shared"])
    ]


def parse_json(text: bytes | str, where: str) -> Any:
    """JSON as Lentando writes it: without NaN, and without an object that has a key twice.

    Args:
        text: JSON; if it is bytes, in UTF-8.
        where: name of the file that it was read from, for messages.

    Raises:
        CheckpointError: if it is not such JSON, or nested too deeply for Python.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        unique = dict(items)
        if len(unique) < len(items):
            keys = [key for key, _ in items]
            raise ValueError(f"the key {next(key for key in keys if keys.count(key) > 1)!r} occurs twice")
        return unique

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON")

    try:
        return json.loads(text, object_pairs_hook=pairs, parse_constant=constant)
    except (ValueError, RecursionError) as error:  # UnicodeDecodeError is a ValueError
        raise CheckpointError(f"{where} is damaged (cut off, or overwritten): it is not JSON ({error})") from error


def _check(content: Any, settings: type, where: str) -> None:
    """Check that no entry is missing, and that each is of the kind that the rest of the code relies on."""
    for key, is_right in {**_CONTENT, "settings": _is_a(settings)}.items():
        if not isinstance(content, dict) or key not in content or not is_right(content[key]):
            raise CheckpointError(f"{where} is damaged: its entry {key!r} is missing or not what Lentando writes there")
    ranks, size = content["parts"]["ranks"], content["world_size"]
    if len(ranks) != size:
        raise CheckpointError(f"{where} is damaged: it names the files of {len(ranks)} ranks, but {size} saved it")


def _is_a(kind: type) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, kind)


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_part(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"file", "size_bytes", "checksum"}
        and isinstance(value["file"], str)
        and PART.fullmatch(value["file"]) is not None
        and _is_count(value["size_bytes"])
        and isinstance(value["checksum"], str)
        and CHECKSUM.fullmatch(value["checksum"]) is not None
    )


def _are_parts(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() == {"ranks", "shared"}
        and isinstance(value["ranks"], list)
        and all(_is_part(part) for part in (*value["ranks"], value["shared"]))
    )


def _is_entry(value: Any) -> bool:
    """Whether a value describes a tensor of a flat buffer: name, shape, dtype, group, and order unless that is C."""
    return (
        isinstance(value, list)
        and len(value) in (4, 5)
        and isinstance(value[0], str)
        and isinstance(value[1], list)
        and all(_is_count(length) for length in value[1])
        and isinstance(value[2], str)
        and (value[3] is None or _is_count(value[3]))
        and all(isinstance(order, str) for order in value[4:])
    )


def _is_list_of(is_right: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list) and all(map(is_right, value))


_CONTENT: dict[str, Callable[[Any], bool]] = {
    "framework": _is_a(str),
    "world_size": lambda value: _is_count(value) and value > 0,
    "inner_steps": _is_count,
    "rounds": _is_count,
    "entries": _is_list_of(_is_entry),
    "layers": lambda value: value is None or isinstance(value, list),
    "why_no_layers": _is_a(str),
    "parts": _are_parts,
}
"""Entries of the content of one optimizer other than ``settings``, each with a check of its value."""


def _checksum_of(content: dict[str, Any]) -> str:
    return blake2b(json.dumps(content, sort_keys=True).encode(), digest_size=16).hexdigest()
