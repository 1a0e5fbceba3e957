"""The checkpoint of one optimizer, as one rank resumes from it."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lentando.comm.errors import CheckpointError
from lentando.comm.flat import Entry, FlatLayout, build_layouts
from lentando.comm.transport import Array
from lentando.optimizers.checkpoint.rank_content import RankContent, SavedRanks
from lentando.optimizers.checkpoint.resizing import MergedRanks, merge_ranks
from lentando.optimizers.checkpoint.tree import flat_nodes, no_flat_state, tensor, unpack
from lentando.optimizers.replica import Replica
from lentando.optimizers.rules.settings_comparison import different_from

__all__ = ["Source", "read_source"]


@dataclass(frozen=True)
class Source:
    """What one rank resumes from.

    Attributes:
        ranks: reads the files of all ranks that have saved the checkpoint.
        own: content of the rank of the same number, or of all ranks merged.
        merged: the merged ranks, None if as many ranks as now have saved the checkpoint.
    """

    ranks: SavedRanks
    own: RankContent
    merged: MergedRanks | None

    @property
    def manifest(self) -> dict[str, Any]:
        """Content of the manifest, for this optimizer."""
        return self.ranks.content

    @property
    def framework(self) -> str:
        """Name of the framework that has saved ``own``."""
        return str(self.own.about["framework"])

    @property
    def extra(self) -> Any:
        """What the program saved in addition."""
        return unpack(self.own.about["extra"], self.own.tensors, no_flat_state)

    @cached_property
    def entries(self) -> list[Entry]:
        """The tensors of the flat buffers when the checkpoint was saved, in their order."""
        return [Entry(name, tuple(shape), *rest) for name, shape, *rest in self.manifest["entries"]]

    @property
    def layouts(self) -> list[FlatLayout]:
        """Layouts of the flat buffers when the checkpoint was saved."""
        return build_layouts(self.entries)

    def model_tensor(self, name: str) -> Array:
        """A tensor of the model, by its name in the checkpoint.

        Raises:
            CheckpointError: if the checkpoint has none of this name.
        """
        return tensor(self.own.tensors, f"model/{name}")

    def shards(self) -> Iterator[RankContent]:
        """The tensors of which every rank holds a shard, rank by rank, so that the rest is not kept in memory."""
        if self.merged is not None:
            yield self.own
            return
        for tensors, about in self.ranks.each():
            nodes = flat_nodes(about["replica"]).items()
            paths = tuple(f"{path}/" for path, node in nodes if node["sharded"])
            yield RankContent({name: array for name, array in tensors.items() if name.startswith(paths)}, about)


def read_source(ranks: SavedRanks, replica: Replica) -> Source:
    """Read what this rank resumes from: its own file, or those of all ranks if another number of ranks has saved them.

    Args:
        ranks: reads the checkpoint.
        replica: the replica that resumes.

    Raises:
        CheckpointError: if the checkpoint is damaged, or was saved with other settings.
    """
    transport = replica.transport
    if found := different_from(replica.settings, ranks.content["settings"]):
        raise CheckpointError(f"it was saved by training with other settings: {found}")
    if ranks.size == transport.size:
        return Source(ranks, ranks.read(transport.rank), None)
    layouts = Source(ranks, RankContent({}, {}), None).layouts
    merged = merge_ranks(ranks.size, ranks.read, layouts, replica.base.resizing, transport.rank)
    return Source(ranks, merged.content, merged)
