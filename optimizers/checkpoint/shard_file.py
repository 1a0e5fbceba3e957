"""One file of a checkpoint: tensors, and JSON that says what they are, in safetensors."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from lentando.comm.errors import CheckpointError
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.folder import checksum, written
from lentando.optimizers.checkpoint.manifest import parse_json

__all__ = ["ShardFile", "read_shard_file", "write_shard_file"]


@dataclass(frozen=True)
class ShardFile:
    """What the manifest knows of a file.

    Attributes:
        file: its name.
        size_bytes: its size.
        checksum: of its content.
    """

    file: str
    size_bytes: int
    checksum: str

    def as_json(self) -> dict[str, Any]:
        """For the manifest."""
        return asdict(self)


def write_shard_file(file: Path, tensors: Mapping[str, Array], about: Any) -> ShardFile:
    """Write tensors, and ``about``, which is JSON. When this returns, they are on the disk."""
    dense = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    with written(file) as partial:
        save_file(dense, partial, metadata={"lentando": json.dumps(about, allow_nan=False)})
        return ShardFile(file.name, partial.stat().st_size, checksum(partial))


def read_shard_file(folder: Path, described: Mapping[str, Any]) -> tuple[dict[str, Array], Any]:
    """The tensors of a file, and what was written about them.

    Raises:
        CheckpointError: if the file is missing or not what the manifest says.
    """
    part = ShardFile(**described)
    file = folder / part.file
    if not file.exists():
        raise CheckpointError(f"{file} is missing: the checkpoint is not complete, or not all of it was copied here")
    size_bytes = file.stat().st_size
    if size_bytes != part.size_bytes:
        raise CheckpointError(f"{file} is damaged: it has {size_bytes} bytes, {part.size_bytes} were written")
    if checksum(file) != part.checksum:
        raise CheckpointError(f"{file} is damaged: its checksum is not that of what was written")
    try:
        with safe_open(file, "numpy") as opened:
            names = list(opened.keys())
            about = parse_json(opened.metadata()["lentando"], f"the description in {file}")
            return {name: opened.get_tensor(name) for name in names}, about
    except (SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a part of a checkpoint: {error}") from error
