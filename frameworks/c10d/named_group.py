"""What torch.distributed and PyTorch's tools ask of a process group besides operations: names, description, devices."""

from typing import Any

import torch
from torch import distributed as dist

__all__ = ["NamedGroup"]

# Without types: the stubs of PyTorch's C++ classes declare overloads that it never calls, and differ between versions.
_ProcessGroup: Any = dist.ProcessGroup


class NamedGroup(_ProcessGroup):  # type: ignore[misc]
    """A process group that keeps its name and description.

    Args:
        rank: number of this process in the group.
        size: number of members.
    """

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # with a store, it refuses subclasses
        self._name = self._description = ""

    def getBackendName(self) -> str:  # noqa: N802 - PyTorch's name
        """The name under which the backend is registered."""
        return "lentando"

    @property
    def _device_types(self) -> list[torch.device]:
        """The devices whose tensors the group takes; saving checkpoints in the background asks for it."""
        return [torch.device("cpu")]

    def getGroupName(self) -> str:  # noqa: N802 - PyTorch's name
        """The name under which torch.distributed has registered the group."""
        return self._name

    def setGroupName(self, name: str) -> None:  # noqa: N802 - PyTorch's name
        """Keep the name: PyTorch's own class keeps it in backends of C++, of which this group has none."""
        self._name = name

    def getGroupDesc(self) -> str:  # noqa: N802 - PyTorch's name
        """The description that was given to ``new_group``."""
        return self._description

    def setGroupDesc(self, description: str) -> None:  # noqa: N802 - PyTorch's name
        """Keep the description, for the same reason as the name."""
        self._description = description
