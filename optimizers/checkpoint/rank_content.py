"""What one rank has saved, and where it is read from."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

from lentando.comm.errors import CheckpointError
from lentando.comm.objects import from_json
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.shard_file import read_shard_file

__all__ = ["RankContent", "SavedRanks", "Tensors"]

Tensors = dict[str, Array]
"""Tensors by their names in a checkpoint."""


class RankContent(NamedTuple):
    """What one rank has saved.

    Attributes:
        tensors: its tensors, and those that are equal on all ranks.
        about: JSON that describes them, and the state that is no tensor.
    """

    tensors: Tensors
    about: Any


@dataclass
class SavedRanks:
    """Reads what the ranks have saved.

    Args:
        folder: folder of the checkpoint.
        content: content of its manifest, for one optimizer.
    """

    folder: Path
    content: dict[str, Any]

    @property
    def size(self) -> int:
        """Number of ranks that have saved the checkpoint."""
        return int(self.content["world_size"])

    def read(self, rank: int) -> RankContent:
        """The content that the rank of this number has saved.

        Raises:
            CheckpointError: if a file is missing, damaged, or another rank's.
        """
        described = self.content["parts"]["ranks"][rank]
        tensors, about = read_shard_file(self.folder, described)
        state = from_json(about["replica"])
        if (state["rank"], state["size"]) != (rank, self.size):
            raise CheckpointError(
                f"{described['file']} is of rank {state['rank']} of {state['size']}, but the manifest names it as that "
                f"of rank {rank} of {self.size}: files of the checkpoint were exchanged"
            )
        return RankContent({**tensors, **self._shared}, about)

    def each(self) -> Iterator[RankContent]:
        """The contents of all ranks, one after the other."""
        return map(self.read, range(self.size))

    @cached_property
    def _shared(self) -> Tensors:
        return read_shard_file(self.folder, self.content["parts"]["shared"])[0]
