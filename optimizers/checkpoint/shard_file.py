"""One file of a checkpoint: tensors, and JSON that describes them, in the format of safetensors."""

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
    """The manifest's description of a file.

    Attributes:
        file: name of the file.
        size_bytes: size of the file.
        checksum: checksum of its content.
    """

    file: str
    size_bytes: int
    checksum: str

    def as_json(self) -> dict[str, Any]:
        """The description as JSON, for the manifest."""
        return asdict(self)


def write_shard_file(file: Path, tensors: Mapping[str, Array], about: Any) -> ShardFile:
    """Write a file, and return its description once it is on the disk.

    Args:
        file: path of the file.
        tensors: tensors by name.
        about: JSON that describes them.
    """
    dense = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    with written(file) as partial:
        save_file(dense, partial, metadata={"lentando": json.dumps(about, allow_nan=False)})
        return ShardFile(file.name, partial.stat().st_size, checksum(partial))


def read_shard_file(folder: Path, described: Mapping[str, Any]) -> tuple[dict[str, Array], Any]:
    """Read a file: its tensors, and the JSON that describes them.

    Args:
        folder: folder of the checkpoint.
        described: the manifest's description of the file.

    Raises:
        CheckpointError: if the file is missing, or its content is not that which was written.
    """
    expected = ShardFile(**described)
    file = folder / expected.file
    if not file.exists():
        raise CheckpointError(f"{file} is missing: the checkpoint is not complete, or not all of it was copied here")
    size_bytes = file.stat().st_size
    if size_bytes != expected.size_bytes:
        raise CheckpointError(f"{file} is damaged: it has {size_bytes} bytes, {expected.size_bytes} were written")
    if checksum(file) != expected.checksum:
        raise CheckpointError(f"{file} is damaged: its checksum is not that of what was written")
    try:
        with safe_open(file, "numpy") as opened:
            names = list(opened.keys())
            about = parse_json(opened.metadata()["lentando"], f"the description in {file}")
            return {name: opened.get_tensor(name) for name in names}, about
    except (SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"{file} is not a part of a checkpoint: {error}") from error
